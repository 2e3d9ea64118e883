"""The program beside the data: ``python -m flops.agent --config FILE``.

Owns the learners of one process, each with a conversation of its own with the aggregator, and the worker
processes that run the user's code for them. One learner with one worker is the usual case; virtual learners
are many that share a few workers: same protocol and, to the bit, same results as as many processes.
"""
