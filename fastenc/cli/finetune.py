"""`fastenc finetune`: an encoder and heads on labels, by all that `fastenc.finetune` can do."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data import DataError
from ..data.augmentation import FeatureMask, GaussianNoise, Mixup, image_augmentation
from ..finetuning.finetune import STRATEGIES
from ..finetuning.pretraining import METHODS, OPTIONS
from ..finetuning.targets import TASKS
from ..frontends import kind_of
from ..frontends.kinds import TABLE
from ..labelled import prepare, save, train_privately
from ..labelled import train as train_with_labels
from ..multitask import ONE_ROW_LOSSES
from ..pipeline import check_model_folder, one_sentence
from .items import ItemsJob, finetune_items, refuse
from .options import (
    ColumnOption,
    DataArgument,
    Fitting,
    KindOption,
    Network,
    OutOption,
    Preparation,
    choice,
    describe_history,
    fraction,
    not_negative,
    one_or_several,
    parse_numbers,
    parse_widths,
    positive,
    report_rows,
)
from .privacy import Privacy, what_is_covered

FINETUNING_LOSSES = ("cross_entropy", "mse", "mae", "huber", "cosine", "triplet")
SEVERAL = "of several targets COLUMN=NAME, once for each"


def parse_image(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    shape = parse_numbers(text, "sizes", "28x28 or 3x32x32", "x")
    if len(shape) not in (2, 3):
        raise typer.BadParameter(f"{text!r} has {len(shape)} sizes; write for example 28x28 or 3x32x32")
    return shape


def check_image(text: str | None) -> str | None:
    parse_image(text)
    return text


@dataclass(frozen=True)
class Targets:
    """What is learned."""

    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="The column of labels or numbers to learn; for .npy, a .npy file of them. Repeat it for several.",
        ),
    ] = None
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"What the target is: {', '.join(TASKS)}; auto by default; {SEVERAL}."),
    ] = None
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help=f"Loss: {', '.join(FINETUNING_LOSSES)}; by default that of the task; {SEVERAL}."
        ),
    ] = None
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=NUMBER", help="What the loss of one of several targets counts; 1 by default."),
    ] = None
    raw_targets: Annotated[
        bool, typer.Option("--raw-targets", help="Train on the numbers as they are, not scaled to deviation 1.")
    ] = False

    def options(self) -> dict[str, Any]:
        """task, loss and weights, as of `fastenc.finetune`."""
        task = named("--task", self.task, TASKS)
        loss = named("--loss", self.loss, ("auto", *FINETUNING_LOSSES))
        weights = named("--weight", self.weight, None)
        if isinstance(loss, dict):
            loss = {name: value for name, value in loss.items() if value != "auto"}
            if rows := [value for value in loss.values() if value not in ONE_ROW_LOSSES]:
                raise DataError(f"--loss is {rows[0]}, which several targets cannot have; leave it out")
        loss = None if loss == "auto" else loss
        return {"task": task or "auto", "loss": loss, "weights": weights, "scale_targets": not self.raw_targets}


def named(option: str, values: list[str] | None, known: tuple[str, ...] | None) -> Any:
    """NAME as it is, or COLUMN=NAME of each as a dict; numbers if nothing is known. None if there are none."""
    if not values:
        return None
    if known is not None and len(values) == 1 and values[0] in known:
        return values[0]
    found: dict[str, Any] = {}
    for text in values:
        column, _, value = text.rpartition("=")
        if column in found:
            raise DataError(f"{option} is given twice for {column}; give it once")
        if not column or not (at_least_0(value) if known is None else value in known):
            single = "" if known is None else "NAME or, for one of several targets, "
            what = "NUMBER, at least 0" if known is None else f"NAME, with a NAME of {', '.join(known)}"
            raise DataError(f"{option} is {text!r}; write {single}COLUMN={what}")
        found[column] = float(value) if known is None else value
    return found


def at_least_0(text: str) -> bool:
    try:
        return 0.0 <= float(text) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True)
class Beginning:
    """How the encoder begins, and which of its layers are trained."""

    strategy: Annotated[str, choice("How to begin", *STRATEGIES)] = "scratch"
    encoder: Annotated[
        Path | None, typer.Option("--from", metavar="DIR", help="The model whose encoder to begin with.")
    ] = None
    frozen: Annotated[
        int | None,
        typer.Option(min=0, help="How many of the first layers not to train; for transfer all but the last."),
    ] = None
    unfreeze_every: Annotated[
        int | None, typer.Option(min=1, help="Train one more of the frozen layers after so many epochs, top down.")
    ] = None
    layer_decay: Annotated[
        float, typer.Option(callback=positive, max=1.0, help="Learning rate of each layer over that of the one above.")
    ] = 1.0
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train adapters of this rank, not the encoder, and merge them.")
    ] = None
    lora_alpha: Annotated[
        float | None, typer.Option(callback=positive, help="Adapters count alpha / rank times; 16 by default.")
    ] = None
    lora_dropout: Annotated[
        float | None, typer.Option(callback=fraction, help="Share of the adapters' inputs dropped in a step; 0.")
    ] = None

    def options(self) -> dict[str, Any]:
        adapters = {"lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        given = {name: value for name, value in adapters.items() if value is not None}
        if given and self.lora_rank is None:
            raise DataError(
                f"--{next(iter(given)).replace('_', '-')} is of adapters; give --lora-rank, or leave it out"
            )
        plain = ("strategy", "encoder", "frozen", "unfreeze_every", "layer_decay", "lora_rank")
        return {**{name: getattr(self, name) for name in plain}, **given}


@dataclass(frozen=True)
class Pretraining:
    """The stage without labels."""

    unlabelled: Annotated[
        str | None, typer.Option(metavar="DATA", help="Rows without labels to pre-train on; by default those of DATA.")
    ] = None
    pretraining: Annotated[str, choice("How to pre-train", *METHODS)] = "autoencoder"
    pretraining_epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the rows to pre-train on; 100 by default.")
    ] = None
    pretraining_noise: Annotated[
        float | None,
        typer.Option(callback=not_negative, help="Noise of denoising and of contrastive views; 0.1 by default."),
    ] = None
    pretraining_mask: Annotated[
        float | None,
        typer.Option(callback=fraction, help="Share of features hidden, masking and contrastive; 0.2 by default."),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(callback=positive, help="Of contrastive pre-training; 0.1 by default.")
    ] = None

    def options(self, strategy: str) -> dict[str, Any]:
        """pretraining and its options, as of `fastenc.finetune`."""
        given = {
            "epochs": ("--pretraining-epochs", self.pretraining_epochs),
            "noise": ("--pretraining-noise", self.pretraining_noise),
            "mask": ("--pretraining-mask", self.pretraining_mask),
            "temperature": ("--temperature", self.temperature),
        }
        made = {}
        for name, (option, value) in given.items():
            if value is None:
                continue
            if strategy != "pretrain":
                raise DataError(f"{option} is of pre-training; give --strategy pretrain, or leave it out")
            if name in OPTIONS and self.pretraining not in OPTIONS[name]:
                methods = " or ".join(OPTIONS[name])
                raise DataError(f"{option} is of --pretraining {methods}, and it is {self.pretraining}; change one")
            made[name] = value
        return {"pretraining": self.pretraining, "pretraining_options": made or None}


@dataclass(frozen=True)
class Augmentation:
    """Other rows of the rows, anew in each epoch."""

    noise: Annotated[
        float, typer.Option(callback=not_negative, help="Gaussian noise added to the features in each epoch.")
    ] = 0.0
    mask: Annotated[float, typer.Option(callback=fraction, help="Share of the features hidden in each epoch.")] = 0.0
    mixup: Annotated[
        float, typer.Option(callback=not_negative, help="Mix rows, and targets, by Beta(this, this); 0 for not.")
    ] = 0.0
    image: Annotated[
        str | None,
        typer.Option(
            callback=check_image, metavar="SIZE", help="Rows are images: 28x28 or 3x32x32. Moves, crops, flips them."
        ),
    ] = None
    shift: Annotated[
        float | None, typer.Option(callback=fraction, help="The most an --image moves, of its sides; 0.1 by default.")
    ] = None
    crop: Annotated[
        float | None,
        typer.Option(callback=positive, max=1.0, help="The least share of an --image that is cut out; 1 by default."),
    ] = None
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images, left to right.")] = False

    def steps(self) -> list[Any] | None:
        """What `Trainer.fit` takes as augment.

        Raises:
            DataError: options of images without their size.
            ModuleNotFoundError: torchvision is missing.
        """
        moves = {"shift": self.shift, "crop": self.crop, "flip": self.flip or None}
        given: dict[str, Any] = {name: value for name, value in moves.items() if value is not None}
        shape = parse_image(self.image)
        if given and shape is None:
            raise DataError(f"--{next(iter(given))} is of images; give their size, for example --image 28x28")
        steps: list[Any] = [] if shape is None else [image_augmentation(shape, **given)]
        for step, value in ((GaussianNoise, self.noise), (FeatureMask, self.mask), (Mixup, self.mixup)):
            steps += [step(value)] if value > 0.0 else []
        return steps or None


def finetune(
    data: DataArgument,
    out: OutOption,
    targets: Targets,
    beginning: Beginning,
    pretraining: Pretraining,
    network: Network,
    preparation: Preparation,
    augmentation: Augmentation,
    fitting: Fitting,
    privacy: Privacy,
    kind: KindOption = "auto",
    column: ColumnOption = None,
) -> None:
    """Train an encoder and a head on the labels of DATA, and save them, with their preprocessing, in --out.

    From scratch; after pre-training on rows without labels (--strategy pretrain); or from the encoder of a model that
    was trained before (--strategy transfer --from DIR), whose preprocessing is then kept. With several targets the
    encoder gets a head for each. fastenc encode and evaluate take what comes out; training.json beside it says what the
    outputs stand for.
    """
    check_model_folder(out)
    target = one_or_several(targets.target)
    kind = kind_of(data, kind, target if isinstance(target, str) else None)
    if kind != TABLE:
        refuse(kind, preparation, augmentation, privacy)
        finetune_kind(kind, data, out, targets, beginning, pretraining, network, fitting, column)
        return
    private = privacy.options(fitting, beginning, augmentation)
    with one_sentence():
        options = {
            **targets.options(),
            **beginning.options(),
            **pretraining.options(beginning.strategy),
            **fitting.trainer(),
            "augment": augmentation.steps(),
        }
    split, seed = fitting.validation_split, fitting.seed
    labelled = prepare(data, target, beginning.encoder, pretraining.unlabelled, preparation.preprocessor(), split, seed)
    prepared, held_out = labelled.prepared, int(labelled.is_held_out.sum())
    report_rows(prepared.dropped, prepared.dropped + len(prepared.rows), prepared.unseen)
    typer.echo(
        f"{len(prepared.rows) - held_out} rows to train on, {held_out} to validate on, {prepared.x.shape[1]} features"
    )
    network_options: dict[str, Any] = {
        "widths": parse_widths(network.widths),
        "activation": network.activation,
        "dropout": network.dropout,
    }
    began = time.perf_counter()
    spent = None
    if private is None:
        result = train_with_labels(
            labelled,
            **options,
            **network_options,
            epochs=fitting.epochs,
            batch_size=fitting.batch_size,
            patience=fitting.patience,
        )
    else:
        names = ("strategy", "encoder", "frozen", "task", "loss", "scale_targets", "seed")
        chosen = {name: options[name] for name in names}
        result, spent = train_privately(labelled, **chosen, **network_options, private=private)
    seconds = time.perf_counter() - began
    save(result, labelled, out, split, seed, target, spent)
    if result.pretraining is not None:
        typer.echo(f"pre-training: {describe_history(result.pretraining.history)}; {result.pretraining.how}")
    typer.echo(f"training: {describe_history(result.history)}; {result.how}")
    typer.echo(f"{seconds:.1f} s; saved in {out}")
    if spent is not None:
        own = labelled.preprocessor if beginning.encoder is None else None
        classes = result.classes is not None
        typer.echo(f"{spent}\n{what_is_covered(own, len(prepared.rows) - held_out, classes)}")


def finetune_kind(
    kind: str,
    data: str,
    out: Path,
    targets: Targets,
    beginning: Beginning,
    pretraining: Pretraining,
    network: Network,
    fitting: Fitting,
    column: str | None,
) -> None:
    """What of the options is for items with a front end; all others are refused."""
    refuse(kind, replace(beginning, strategy="scratch", encoder=None, frozen=None))
    refuse(kind, replace(pretraining, pretraining_epochs=None), replace(targets, target=None, task=None, loss=None))
    of_targets = targets.options()
    target = one_or_several(targets.target)
    if isinstance(target, list) or isinstance(of_targets["task"], dict) or isinstance(of_targets["loss"], dict):
        raise DataError("a front end takes one --target, with one --task and one --loss; leave the others out")
    finetune_items(
        ItemsJob(data, kind, out, network, fitting, fitting.trainer(), target, column),
        strategy=beginning.strategy,
        start=beginning.encoder,
        frozen=beginning.frozen,
        task=of_targets["task"],
        loss=of_targets["loss"],
        pretraining_epochs=pretraining.pretraining_epochs,
    )
