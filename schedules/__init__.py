"""How the declared operation runs: one module per target, each with its config.

Nothing outside this package calls ``sch.*``.
"""
