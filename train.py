"""Trains a model: `torchrun --nproc-per-node N train.py recipe=gpt_32k optim.lr=1e-3`; see `longctx.train`."""

from longctx.train import start

if __name__ == "__main__":
    start()
