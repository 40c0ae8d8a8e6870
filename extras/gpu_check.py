"""Check a GPU with one command: speed, memory, the ImageNet presets and the GPU tests.

    python extras/gpu_check.py                    # an estimated 10 minutes on an H100
    python extras/gpu_check.py --only variants    # what would make a step faster, 10 minutes
    python extras/gpu_check.py --cifar10 FOLDER   # all stages on CIFAR-10 too, 9 minutes more
    python extras/gpu_check.py --tiny             # tests this script, also on a CPU

Nothing is downloaded: frozen networks get random weights of the right shapes. Each part has its own
process and time limit, so a failure or hang stops only that part. Prints a table per part, and
writes results.json and each part's output (PART.log) to --out. Rerun the same command to resume: it
repeats only the parts that did not finish.
"""

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._inductor.config
import torch.nn.functional as F
from budget import adamw, build, flops, mean_loss, random_batch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rae  # noqa: E402
from dit_dh import sample, time_grid  # noqa: E402
from rae import UsageError, check_same_run, make_folder  # noqa: E402
from toy.world import toy_images  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.autocast(DEVICE, torch.bfloat16)

# Settings of the parts: (full, --tiny). get_args adds these to args.
SIZES = {
    "seconds": (2, 0),  # per measurement
    "matmul_size": (8192, 256),
    "models": (("S", "XL"), ("tiny",)),  # of budget.py, the largest last
    "compiler": ("inductor", "aot_eager"),
    "micro_batch_size": (64, 2),
    "euler_steps": (50, 2),
    "sample_batch_size": (16, 2),
    "num_photos": (64, 4),
    "workers": (min(12, os.cpu_count()), 0),
    # Flags of the presets. The last ten steps are timed alone, after compilation.
    "preset_flags": ("--steps 20 --log-every 10", "--steps 2 --no-compile --global-batch-size 2"),
    "decoder": (
        "--starts 0 0 0 --eval-num 64",  # all losses from the start
        "--starts 0 1 1 --eval-num 2 --size toy --image-size 32 --resize 40",
    ),
    "dit": ("", "--backbone 16,1,2 --wide-head 16,1,2"),
    # CIFAR-10. The encoder makes 64 tokens of 192 channels. alpha is the toy's 4 at 2,048
    # numbers, times sqrt(64 * 192 / 2048). These settings have not been tried on a GPU.
    "cifar10_seconds": ((60, 90, 240), (1, 1, 1)),
    "cifar10_batch_size": (256, 8),
    "cifar10_probe": (100, 4),  # steps
    "cifar10_encoder": (
        "--patch 4 --depth 8 --width 192 --heads 6",
        "--patch 8 --depth 1 --width 16 --heads 2",
    ),
    "cifar10_dit": (
        "--backbone 384,12,6 --wide-head 384,2,6 --alpha 9.8 --lr 1e-3 --hold 500 --ema 0.999",
        "--backbone 16,1,2 --wide-head 24,1,2",
    ),
    "cifar10_samples": ("--num 2000", "--num 20 --steps 2"),
}

# ---------------------------------------------------------------------------------------------
# Measuring


def setup(precision):
    """Set TF32 and the allowed attention kernels as the training scripts do."""
    rae.setup_distributed(argparse.Namespace(device=DEVICE, precision=precision))


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def median_time(run, seconds):
    """Median seconds per call of `run`, measured for `seconds` after two warm-up calls."""
    run()
    run()
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()  # don't count what compiling needed
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def free_memory():
    """Forget compiled blocks, and start a new count for peak_gb."""
    torch._dynamo.reset()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb():
    """Peak of allocated GPU memory. 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9


def matmul_tflops(precision, args):
    """TFLOP/s of a large matrix product. Leaves the process set up for this precision."""
    setup(precision)
    n = args.matmul_size
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(n, n, device=DEVICE, dtype=dtype)
    return 2 * n**3 / 1e12 / median_time(lambda: a @ a, args.seconds)


def full_speed(name, args):
    """images/s of training if all FLOPs ran at the speed of large matrix products."""
    return 1e12 * matmul_tflops("bf16", args) / flops(name)


def measure_step(name, args, limit, micro_batches=2, mode="default", no_ema=False, no_adam=False):
    """Speed and peak memory of a training step of train_diffusion.py, given latents.

    share is the speed relative to `limit`, from full_speed. mode is for torch.compile; None means
    eager.
    """
    free_memory()
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = build(name)
        batch = random_batch(model, args.micro_batch_size)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw(model)
    if mode is not None:
        for block in model.blocks:
            block.compile(dynamic=False, backend=args.compiler, mode=mode)

    def step():
        for _ in range(micro_batches):
            (mean_loss(model, *batch, BF16) / micro_batches).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():
            if not no_adam:
                optimizer.step()
            if not no_ema:
                rae.update_ema(ema, model, 0.9995, 10**5)
        optimizer.zero_grad()

    images_per_s = micro_batches * args.micro_batch_size / median_time(step, args.seconds)
    share = images_per_s / limit
    return {"images_per_s": images_per_s, "share": share, "memory_gb": peak_gb()}


# ---------------------------------------------------------------------------------------------
# Parts that measure. They yield the rows of a table one by one, so a failure keeps earlier rows.


def matmul(args):
    for precision in ("bf16", "tf32"):
        what = f"{args.matmul_size} x {args.matmul_size}, {precision}"
        yield {"what": what, "tflops": matmul_tflops(precision, args)}


def train(args):
    """Training steps of DiT^DH, eager and compiled, with one and two micro-batches."""
    for name in args.models:
        limit = full_speed(name, args)
        for how, mode in (("eager", None), ("compiled", "default")):
            for micro_batches in (1, 2):
                what = f"DiT^DH-{name}, {how}, {micro_batches} x {args.micro_batch_size}"
                yield {"what": what} | measure_step(name, args, limit, micro_batches, mode)


# Options of measure_step, and the attention backend. The riskiest variants come last.
VARIANTS = {
    "default": ({}, None),
    "without EMA": ({"no_ema": True}, None),
    "without optimizer": ({"no_adam": True}, None),
    "flash attention": ({}, SDPBackend.FLASH_ATTENTION),
    "efficient attention": ({}, SDPBackend.EFFICIENT_ATTENTION),
    "math attention": ({}, SDPBackend.MATH),
    "cuDNN attention": ({}, SDPBackend.CUDNN_ATTENTION),
    "max-autotune": ({"mode": "max-autotune-no-cudagraphs"}, None),
}


def variants(args):
    """One change at a time to the large model's compiled step with two micro-batches."""
    # torch's cache may hold code that was compiled for another attention backend.
    torch._inductor.config.force_disable_caches = True
    yield {"what": "kernel of the backbone's attention", "note": attention_kernel()}
    name = args.models[-1]
    limit = full_speed(name, args)
    for what, (options, backend) in VARIANTS.items():
        context = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        try:
            with context:
                numbers = measure_step(name, args, limit, **options)
        except Exception as error:  # torch raises many types; the traceback goes to the log
            traceback.print_exc()
            numbers = {"note": f"failed: {type(error).__name__}"}
        yield {"what": what} | numbers


def attention_kernel():
    """The kernel that PyTorch chooses for the attention of XL's backbone, with head dim 72."""
    setup("bf16")
    q = torch.randn(2, 16, 256, 72, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q)  # warm-up
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        F.scaled_dot_product_attention(q, q, q)
        synchronize()
    own_time = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    longest = max(profiler.key_averages(), key=lambda e: getattr(e, own_time), default=None)
    if longest is None or getattr(longest, own_time) == 0:
        return "unknown: the profiler saw no kernel"
    return longest.key


def sampling(args):
    """Sample the large model, unguided and with AutoGuidance by the small one."""
    setup("bf16")
    with torch.device(DEVICE):
        model = build(args.models[-1]).eval()
        guide = build(args.models[0]).eval()
    timesteps = time_grid(args.euler_steps, 1.0)
    for batch_size in (1, args.sample_batch_size):
        noise = torch.randn(batch_size, model.grid_size**2, model.latent_dim, device=DEVICE)
        y = torch.zeros(batch_size, dtype=torch.long, device=DEVICE)
        for guidance_model in (None, guide):

            def draw():
                with BF16:
                    sample(model, noise, y, timesteps, guidance_model=guidance_model)

            free_memory()
            seconds = median_time(draw, args.seconds)
            yield {
                "what": f"batch of {batch_size}" + (", AutoGuidance" if guidance_model else ""),
                "seconds": seconds,
                "images_per_s": batch_size / seconds,
                "memory_gb": peak_gb(),
            }


# ---------------------------------------------------------------------------------------------
# Parts that run scripts


class Tee(io.StringIO):
    """Keeps what is written and echoes it to stdout."""

    def write(self, text):
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def run(script, *words):
    """Run a script of this repository in this process; returns what it printed."""
    sys.argv = [script, *map(str, words)]
    print(f"$ python {shlex.join(sys.argv)}", flush=True)
    with contextlib.redirect_stdout(Tee()) as printed:
        importlib.import_module(Path(script).stem).main()
    return printed.getvalue()


def number_after(word, printed):
    """The last number that follows a word in what a script printed."""
    return float(re.findall(rf"{word}\s+([\d.e+-]+)", printed)[-1])


# Peak GB in eager mode, computed by budget.py, without DistributedDataParallel's buffers (1.7 GB in
# stage 1, 3.4 in stage 2). Compiled blocks need less.
COMPUTED_GB = {
    "train_decoder.py imagenet256": 52,
    "train_decoder.py imagenet512": 47,
    "train_diffusion.py imagenet256": 62,
    "train_diffusion.py imagenet512": 63,
}


def presets(args):
    """A few steps of both ImageNet presets of both stages, as each of eight GPUs would run them."""
    work = Path(args.out, "work")
    decoder_flags = [*random_weights(work), *args.decoder.split()]
    photos = args.photos or toy_photos(work / "photos", args.num_photos)
    common = ["--data", photos, "--workers", args.workers]
    for preset in ("imagenet256", "imagenet512"):
        dit_flags = ["--decoder", work / f"train_decoder_{preset}/checkpoint.pt", *args.dit.split()]
        for stage, flags in (("train_decoder", decoder_flags), ("train_diffusion", dit_flags)):
            per_gpu = importlib.import_module(stage).PRESETS[preset]["global_batch_size"] // 8
            words = ["--preset", preset, *common, "--global-batch-size", per_gpu, *flags]
            free_memory()
            out = work / f"{stage}_{preset}"
            printed = run(f"{stage}.py", *words, *args.preset_flags.split(), "--out", out)
            what = f"{stage}.py {preset}"
            yield {
                "what": what,
                "images_per_s": number_after("images_per_s", printed),
                "memory_gb": peak_gb(),
                "computed_gb": COMPUTED_GB[what],
            }
        for stage in ("train_decoder", "train_diffusion"):  # frees 20 GB
            shutil.rmtree(work / f"{stage}_{preset}")


def random_weights(folder):
    """Write random weights of the frozen networks; returns the flags that name them."""
    import timm

    make_folder(folder)
    models = {
        "encoder": rae.ENCODERS["dinov2-b"][0],
        "dino": rae.ENCODERS["dino-s8"][0],
        "vgg": "vgg16.tv_in1k",
    }
    weights = {name: timm.create_model(model).state_dict() for name, model in models.items()}
    weights["lpips"] = {}
    for i, width in enumerate((64, 128, 256, 512, 512)):
        weights["lpips"][f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    flags = []
    for name, state in weights.items():
        torch.save(state, folder / f"{name}.pt")
        flags += [f"--{name}-weights", folder / f"{name}.pt"]
    return flags


def toy_photos(folder, num):
    """Write 400 px JPEGs of the toy world, in place of photographs."""
    images, labels = toy_images(num, seed=3, size=400)
    for i, (image, label) in enumerate(zip(images, labels)):
        make_folder(folder / str(label))
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / str(label) / f"{i}.jpg")
    return folder


def gpu_tests(args):
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "extras/test_gpu.py"]
    log = Path(args.out, "pytest.log").resolve()
    with open(log, "w") as f:
        done = subprocess.run(command, cwd=ROOT, stdout=f, stderr=f)
    last = log.read_text().strip().splitlines()[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", last)}
    yield {"what": "pytest -m gpu extras/test_gpu.py"} | counts
    if done.returncode != 0:
        raise UsageError(f"see {log}: {last}")


def cifar10(args):
    """All stages from scratch, each for a given time; then the scores of docs/cifar10.md."""
    folder = Path(args.out, "cifar10")
    shutil.rmtree(folder, ignore_errors=True)
    work = Path(args.out, "work")
    make_folder(work)
    test = f"{args.cifar10}/test"
    size = args.cifar10_batch_size

    def train_for(seconds, script, *words, out):
        """Time a few steps of a script, then run it for about this many seconds."""
        words = ["--data", f"{args.cifar10}/train", *words]
        probe = ["--steps", args.cifar10_probe, "--out", work / out]
        speed = number_after("images_per_s", run(script, *words, *probe))
        steps = max(args.cifar10_probe, round(seconds * speed / size))
        start = time.perf_counter()
        run(script, *words, "--steps", steps, "--out", folder / out)
        return {"what": shlex.join(["python", *sys.argv]), "seconds": time.perf_counter() - start}

    pretrain_s, decoder_s, diffusion_s = args.cifar10_seconds
    words = ["--batch-size", size, "--workers", args.workers, *args.cifar10_encoder.split()]
    yield train_for(pretrain_s, "extras/pretrain_encoder.py", *words, out="encoder.pt")
    encoder = folder / "encoder.pt"
    common = ["--global-batch-size", size, "--workers", args.workers, "--log-every", 10]
    words = ["--encoder", encoder, "--val-data", test, *common]
    yield train_for(decoder_s, "train_decoder.py", *words, out="decoder")
    decoder = folder / "decoder/checkpoint.pt"
    words = ["--decoder", decoder, *common, *args.cifar10_dit.split()]
    yield train_for(diffusion_s, "train_diffusion.py", *words, out="diffusion")

    def distance(out):
        printed = run("fid.py", f"{out}.npz", test, "--features", f"encoder:{encoder}")
        return number_after("distance", printed)

    for sigma in (0, 0.8):
        out = folder / f"reconstructions_{sigma}"
        words = ["--data", test, "--decoder", decoder, "--sigma", sigma, "--out", out]
        psnr = number_after("PSNR", run("extras/reconstruct.py", *words))
        yield {"what": f"reconstructions, noise {sigma}", "psnr": psnr, "distance": distance(out)}
    for cfg_scale in (1.0, 1.5):
        out = folder / f"samples_{cfg_scale}"
        words = ["--ckpt", folder / "diffusion/checkpoint.pt", "--cfg-scale", cfg_scale]
        run("sample.py", *words, *args.cifar10_samples.split(), "--out", out)
        yield {"what": f"samples, CFG {cfg_scale}, {out}.png", "distance": distance(out)}


# ---------------------------------------------------------------------------------------------
# Processes and results

PARTS = {  # name: function, time limit in seconds
    "matmul": (matmul, 60),
    "train": (train, 180),
    "variants": (variants, 900),
    "sample": (sampling, 120),
    "presets": (presets, 600),
    "tests": (gpu_tests, 180),
    "cifar10": (cifar10, 900),
}


def run_part(name, out):
    """Run a part in a process of its own. Returns its rows, seconds, and "error" if it failed."""
    rows = out / f"{name}.jsonl"
    log = out / f"{name}.log"
    rows.write_text("")
    shutil.rmtree(out / "work", ignore_errors=True)  # left by a killed run
    limit = PARTS[name][1]
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    result = {}
    start = time.perf_counter()
    with open(log, "w") as f:
        process = subprocess.Popen(command, stdout=f, stderr=f, start_new_session=True)
        try:
            if process.wait(limit) != 0:
                lines = log.read_text(errors="replace").strip().splitlines()
                last = lines[-1] if lines else "no output"
                result["error"] = f"failed with {process.returncode}: {last}"
        except subprocess.TimeoutExpired:
            result["error"] = f"timed out after {limit} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its child processes
            process.wait()
    result["seconds"] = time.perf_counter() - start
    result["rows"] = [json.loads(line) for line in open(rows)]
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


def print_table(name, result):
    """A part's rows as a Markdown table."""
    print(f"\n{name}: {result.get('error', 'finished')} ({result['seconds']:.0f} s)")
    columns = []
    for row in result["rows"]:
        columns += [column for column in row if column not in columns]
    lines = [columns, ["---"] * len(columns)]
    for row in result["rows"]:
        cells = [row.get(column, "") for column in columns]
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells])
    if columns:
        print("\n".join(f"| {' | '.join(cells)} |" for cells in lines), flush=True)


def get_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--only", help=f"comma-separated parts, of {','.join(PARTS)}")
    p.add_argument("--photos", help="folder of photographs for the presets (default: the toy)")
    p.add_argument("--cifar10", help="folder with train/ and test/, one subfolder per class")
    p.add_argument("--out", default="out/gpu_check", help="folder of the results")
    p.add_argument("--tiny", action="store_true", help="tiny sizes, to test this script")
    p.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run_part sets it
    args = p.parse_args()
    for name, pair in SIZES.items():
        setattr(args, name, pair[args.tiny])
    return args


def main():
    args = get_args()
    out = Path(args.out)
    if args.part:
        with open(out / f"{args.part}.jsonl", "w") as f:
            for row in PARTS[args.part][0](args):
                f.write(json.dumps(row) + "\n")
                f.flush()
        return

    names = ["matmul", "train", "sample", "presets", "tests"]
    if args.only:
        names = args.only.split(",")
    elif args.cifar10:
        names.append("cifar10")
    if not PARTS.keys() >= set(names):
        raise UsageError(f"--only {args.only}: choose from {','.join(PARTS)}")
    if "cifar10" in names and not args.cifar10:
        raise UsageError("--only cifar10 needs --cifar10 FOLDER")
    if DEVICE == "cpu" and not args.tiny:
        raise UsageError("no CUDA device found; --tiny tests this script on a CPU")

    # Resume: parts that finished on the same machine are not repeated.
    make_folder(out)
    path = out / "results.json"
    if any(out.iterdir()) and not path.exists():  # parts delete folders in it
        raise UsageError(f"{out} is not empty; choose another --out")
    machine = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    settings = {"machine": machine, "torch": torch.__version__, "tiny": args.tiny}
    parts = {}
    if path.exists():
        saved = json.loads(path.read_text())
        parts = saved.pop("parts")
        check_same_run(out, saved, settings)
    path.write_text(json.dumps(settings | {"parts": parts}, indent=1))
    print(f"{machine}, torch {torch.__version__}", flush=True)
    for name in names:
        if name not in parts or "error" in parts[name]:
            parts[name] = run_part(name, out)
            path.write_text(json.dumps(settings | {"parts": parts}, indent=1))
        print_table(name, parts[name])

    failed = [name for name in names if "error" in parts[name]]
    if failed:
        raise UsageError(f"failed: {', '.join(failed)}; see {out}/PART.log")


if __name__ == "__main__":
    rae.run_script(main)
