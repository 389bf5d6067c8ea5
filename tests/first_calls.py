"""Prints how many processes of 400 found torch's logarithm inexact when four threads called it first together.

Where nothing is done about it, that was 13 to 16 on two cores with AVX-512.
"""

import os

import torch

VALUES = torch.arange(1, 16385, dtype=torch.float32)


def is_exact() -> bool:
    """Whether the first logarithms of this process are those of twice the precision."""
    torch.set_num_threads(4)
    return bool(torch.allclose(torch.log(VALUES).double(), torch.log(VALUES.double()), rtol=1e-6))


if __name__ == "__main__":
    inexact = 0
    for _ in range(400):
        child = os.fork()
        if child == 0:
            os._exit(0 if is_exact() else 1)
        inexact += os.waitpid(child, 0)[1] != 0
    print(inexact)
