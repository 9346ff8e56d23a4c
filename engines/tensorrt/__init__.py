"""TensorRT: plans are built on the machine that runs them, kept by content, and run with CUDA graphs.

machine.py    what is installed here and which GPU it is
profiles.py   which sizes a stage is built for
plans.py      the store: keys, metadata, locks, list and prune
builder.py    ONNX -> plan, in a process of its own
build.py      every stage of a bundle
cuda.py       memory, stream and graphs of the GPU
engine.py     the engine of `engines/base.py`

Importing any of these needs neither tensorrt nor CUDA.
"""
