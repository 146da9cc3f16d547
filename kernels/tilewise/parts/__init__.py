"""The four questions of a tile: where are my rows, which pairs count, what is a score, what is kept?

    where are my rows    addressing.py                     addresses of tiles, any strides
    which pairs count    masks/, intervals.py, bounds.py   a mask a file; which keys a tile of rows must visit
    what is a score      scores/, similarity.py            a modifier a file; scale and cosine
    what is kept         softmax.py, dropout.py            the running softmax; which weights are dropped

A mask or score has, in one file, what it does on the device, what the host knows of it, and its twin in plain
PyTorch. shape.py has the sizes of a call, numerics.py how numbers are widened, rounded and multiplied.
"""
