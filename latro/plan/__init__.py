"""A step on paper: FLOPs, bytes and seconds of an update, counted from the shape of a model.

shape.py: what a model is made of. work.py: which tokens go through it, and the FLOPs of that. memory.py: bytes on one
device. machine.py: what GPUs and links do in a second. layout.py: how a model is spread over GPUs, and what an update
takes then. options.py, command.py: `latro plan`.
"""
