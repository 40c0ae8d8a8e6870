"""Run a training script, alone or under torchrun, and keep what its optimisers did.

    python ranks.py KEEP SCRIPT [flags]

Each process writes KEEP/RANK.pt: for each optimiser the gradients of its first step and its
parameters at the end, the names of the modules that DistributedDataParallel wrapped, and how many
graphs were compiled. With EPS in the environment that becomes AdamW's eps.
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


class KeepingAdamW(torch.optim.AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **options, eps=float(os.environ.get("EPS", 1e-8)))
        self.first_gradients = None
        optimizers.append(self)

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    def step(self):
        if self.first_gradients is None:
            self.first_gradients = [p.grad.clone() for p in self.parameters()]
        return super().step()


class KeepingDDP(DistributedDataParallel):
    def __init__(self, module, **options):
        super().__init__(module, **options)
        wrapped.append(type(module).__name__)


torch.optim.AdamW = KeepingAdamW
torch.nn.parallel.DistributedDataParallel = KeepingDDP
keep = Path(sys.argv[1])
rank = os.environ.get("RANK", "0")
sys.argv = sys.argv[2:]
try:
    __import__(Path(sys.argv[0]).stem).main()
except ValueError as error:
    sys.exit(f"error: {error}")
kept = []
for optimizer in optimizers:
    parameters = [p.detach() for p in optimizer.parameters()]
    kept.append({"grads": optimizer.first_gradients, "params": parameters})
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
torch.save({"optimizers": kept, "wrapped": wrapped, "graphs": graphs}, keep / f"{rank}.pt")
