"""python ranks.py KEEP SCRIPT [flags]: runs a training script, alone or under torchrun, and writes for each
process KEEP/RANK.pt: for each optimiser the gradients of its first step and its parameters at the end.

With EPS set in the environment it becomes AdamW's eps."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
kept, keep = [], Path(sys.argv[1])


class AdamW(torch.optim.AdamW):
    def __init__(self, params, **kw):
        super().__init__(params, **kw, eps=float(os.environ.get("EPS", 1e-8)))
        self.grads = None
        kept.append(self)

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self):
        self.grads = self.grads or [p.grad.clone() for p in self.parameters()]
        return super().step()


torch.optim.AdamW = AdamW
sys.argv = sys.argv[2:]
__import__(Path(sys.argv[0]).stem).main()
torch.save([{"grads": o.grads, "params": [p.detach() for p in o.parameters()]} for o in kept],
           keep / f"{os.environ.get('RANK', 0)}.pt")
