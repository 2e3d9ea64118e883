"""The `flops` command: what a user types, and what the terminal shows.

It talks to the manager through its REST API only, and starts one on this machine where none runs. Ending
or interrupting a command never ends a project. Every command has ``--json``: one document on stdout, or a
line for each event of a stream; errors then are JSON on stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""
