def jobs(compiler):
    return []
