CASES = {"resnet50": 1}


def jobs(compiler, names):
    return []
