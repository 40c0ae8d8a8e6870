"""Run a training script, alone or under torchrun, and record what its optimizers did.

    python _ddp_worker.py FOLDER SCRIPT [flags]

Each rank writes FOLDER/RANK.pt: for every optimizer the gradients of its first step and its final
parameters, the names of the modules that DistributedDataParallel wrapped, and the number of
compiled graphs. EPS in the environment sets AdamW's eps.
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo.utils
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
optimizers = []
wrapped = []


class RecordingAdamW(torch.optim.AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **options, eps=float(os.environ.get("EPS", 1e-8)))
        self.params = self.param_groups[0]["params"]
        self.grads = None
        optimizers.append(self)

    def step(self):
        self.grads = self.grads or [p.grad.clone() for p in self.params]
        return super().step()


class RecordingDDP(DistributedDataParallel):
    def __init__(self, module, **options):
        super().__init__(module, **options)
        wrapped.append(type(module).__name__)


torch.optim.AdamW = RecordingAdamW
torch.nn.parallel.DistributedDataParallel = RecordingDDP
folder = Path(sys.argv[1])
rank = os.environ.get("RANK", "0")
sys.argv = sys.argv[2:]

import rae  # noqa: E402  (after the patches)

rae.run_script(__import__(Path(sys.argv[0]).stem).main)
content = {
    "optimizers": [
        {"grads": o.grads, "params": [p.detach() for p in o.params]} for o in optimizers
    ],
    "wrapped": wrapped,
    "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
}
torch.save(content, folder / f"{rank}.pt")
