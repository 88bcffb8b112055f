"""One file per paper or tight family: configuration, `init` and `apply`."""
