"""The program on a data owner's machine that has joined a manager: ``python -m flops.node --home DIR``.

Owns everything below FLOPS_HOME/node: who the machine is to its manager, what its owner allows, its data, the
learners that run on them and the journal of what ran. Promises: connections go out only, to the manager alone
(and to the machine's own package index); nothing that the manager sends is run as a command: the node knows
one kind of work, being a learner of a project, and starts it from its own programs with its own paths; what
the owner does not allow is refused before anything is fetched; of the data nothing is told but tags and
counts. A node that is killed finds its learners again.
"""
