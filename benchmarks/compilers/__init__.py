"""What compilers for TPUs and GPUs make of the norms, without such a device.

`layers`, `networks`, `memory`, `weights` and `pods` say what is compiled, `targets` for what, `hlo`
reads the compiled program, `traffic` counts what it moves, and `show` prints and draws the results.
"""
