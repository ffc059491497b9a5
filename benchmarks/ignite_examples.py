"""PyTorch-Ignite's own examples with one import changed, on one rank and on two, over made-up data.

    git clone --branch v0.5.5 https://github.com/pytorch/ignite
    python benchmarks/ignite_examples.py ignite [mnist cifar10 gan transformers] [--nproc 1 2]

The scripts are read from the checkout, `from ignite.engine` in them becomes `from allstep.ignite`, and they run in a
folder that is removed. torchvision, transformers, datasets and fire need not be installed: stand-ins give small models
and random data of the same shapes, so that nothing is downloaded. Each run is an `allstep run` with a World around the
script. Printed is a line for each; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import ast
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

EXAMPLES = {
    "mnist": ("mnist/mnist.py", ["--batch_size=16", "--val_batch_size=16", "--epochs=2", "--log_interval=2"]),
    "cifar10": (
        "cifar10/main.py",
        [
            "run",
            "--batch_size=16",
            "--num_epochs=3",
            "--num_warmup_epochs=1",
            "--validate_every=1",
            "--num_workers=0",
            "--data_path=data",
            "--output_path=out",
            "--checkpoint_every=3",
            "--log_every_iters=2",
        ],
    ),
    "gan": (
        "gan/dcgan.py",
        [
            "--dataset=fake",
            "--dataroot=data",
            "--workers=0",
            "--batch-size=16",
            "--epochs=2",
            "--output-dir=out",
            "--g-filters=4",
            "--d-filters=4",
            "--z-dim=8",
            "--no-cuda",
        ],
    ),
    "transformers": (
        "transformers/main.py",
        [
            "run",
            "--data_dir=data",
            "--output_dir=out",
            "--batch_size=8",
            "--num_epochs=2",
            "--num_workers=0",
            "--max_length=12",
            "--checkpoint_every=3",
        ],
    ),
}
RUN_TAKES_AT_MOST_S = 240


def stand_ins() -> dict[str, ModuleType]:
    """Modules in place of those that would download data and models."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    def images(shape: tuple[int, ...], samples: int) -> Any:
        def dataset(*args: Any, **options: Any) -> TensorDataset:
            draw = torch.Generator().manual_seed(0)
            labels = torch.randint(0, 10, (samples,), generator=draw)
            return TensorDataset(torch.randn(samples, *shape, generator=draw), labels)

        return dataset

    def same(*args: Any, **options: Any) -> Any:
        return lambda sample: sample

    def small_network(num_classes: int = 10) -> nn.Module:
        layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(4, num_classes))

    class Classifier(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(100, 8), nn.Linear(8, classes)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            weights = attention_mask.unsqueeze(-1)
            return {"logits": self.head((self.embedding(input_ids) * weights).mean(1))}

    def tokens(text: str, pair: Any = None, *, max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[hash_of(word) for word in text.split()][:max_length]])
        padding = torch.zeros(1, max_length - ids.shape[1], dtype=torch.long)
        return {"input_ids": torch.cat([ids, padding], 1), "attention_mask": torch.cat([ids > 0, padding > 0], 1)}

    def hash_of(word: str) -> int:
        return 1 + sum(word.encode()) % 99

    def texts(*args: Any, **options: Any) -> Any:
        half = {
            "text": [f"review {n} is {'good' if n % 2 else 'bad'}" for n in range(32)],
            "label": [[n % 2] for n in range(32)],
        }
        return half, half

    def fire(commands: dict[str, Any]) -> None:
        command, *options = sys.argv[1:]
        pairs = (option.removeprefix("--").split("=", 1) for option in options)
        commands[command](**{name: value_of(text) for name, text in pairs})

    def value_of(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    vision, modules = ModuleType("torchvision"), {}
    parts = {
        "datasets": {
            "MNIST": images((1, 28, 28), 64),
            "CIFAR10": images((3, 32, 32), 64),
            "FakeData": images((3, 64, 64), 64),
        },
        "transforms": dict.fromkeys(
            ("Compose", "Normalize", "ToTensor", "Pad", "RandomCrop", "RandomHorizontalFlip", "Resize", "CenterCrop"),
            same,
        ),
        "models": {"resnet18": small_network},
        "utils": {"save_image": lambda image, path, **options: torch.save(image, path)},
    }
    for name, content in parts.items():
        part = ModuleType(f"torchvision.{name}")
        vars(part).update(content)
        setattr(vision, name, part)
        modules[part.__name__] = part
    others = {
        "fire": {"Fire": fire},
        "datasets": {"load_dataset": texts},
        "transformers": {
            "AutoTokenizer": SimpleNamespace(from_pretrained=lambda *args, **options: tokens),
            "AutoConfig": SimpleNamespace(from_pretrained=lambda *args, **options: SimpleNamespace(**options)),
            "AutoModelForSequenceClassification": SimpleNamespace(
                from_pretrained=lambda *args, config, **options: Classifier(config.num_labels)
            ),
        },
    }
    for name, content in others.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(content)
    return {"torchvision": vision, **modules}


def inside(script: str, arguments: list[str]) -> None:
    """What each rank does: run the script as `__main__` in a World, with the stand-ins."""
    import allstep

    sys.modules.update(stand_ins())
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    with allstep.init():
        runpy.run_path(script, run_name="__main__")


def succeeds(checkout: Path, name: str, ranks: int) -> str | None:
    """Run an example; the end of what it printed where it failed, else None."""
    script, arguments = EXAMPLES[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shutil.copytree(checkout / "examples" / Path(script).parent, folder / "example")
        changed = folder / "example" / Path(script).name
        text = changed.read_text()
        if text.count("from ignite.engine import") != 1:
            return f"{script} has no import of ignite.engine, or several"
        changed.write_text(text.replace("from ignite.engine import", "from allstep.ignite import"))
        for made in ("data", "out"):
            (folder / made).mkdir()
        command = [sys.executable, "-m", "allstep", "run", "--nproc", str(ranks), str(Path(__file__).resolve())]
        done = subprocess.run(
            [*command, "--inside", str(changed), *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=RUN_TAKES_AT_MOST_S,
            check=False,
        )
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]


def main() -> int:
    """Run the examples that are asked for, and say which failed."""
    if "--inside" in sys.argv[1:2]:
        inside(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of pytorch/ignite")
    parser.add_argument("examples", nargs="*", default=[*EXAMPLES])
    parser.add_argument("--nproc", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    failures = 0
    for name in arguments.examples:
        for ranks in arguments.nproc:
            failure = succeeds(arguments.checkout, name, ranks)
            print(
                f"{name} on {ranks}: {'ran' if failure is None else 'FAILED'}",
                failure or "",
                sep="\n" if failure else "",
            )
            failures += failure is not None
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
