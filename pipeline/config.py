"""The run configuration: one frozen model per stage, unknown keys refused by name, every field described and bounded."""

from __future__ import annotations

import difflib
import pathlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import pydantic
import yaml

from pipeline.errors import ConfigError
from pipeline.triggers import TRIGGERS


class Section(pydantic.BaseModel):
    """Base of all sections: frozen, and unknown keys are errors; a number is finite, for a stage's key is JSON."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class IngestConfig(Section):
    """What a submission may hold."""

    format: Literal["imagefolder", "llava", "parquet"] | None = pydantic.Field(
        None, description="Format of the submission; `null`: its files tell, and where two fit it must be named."
    )
    max_pixels: int = pydantic.Field(
        25_000_000, gt=0, description="Largest picture, width x height in pixels; a row with a larger one is rejected."
    )
    max_image_bytes: int = pydantic.Field(
        10_000_000, gt=0, description="Largest picture file, bytes; a row with a larger one is rejected."
    )
    max_images: int = pydantic.Field(64, gt=0, description="Most pictures in a row; one with more is rejected.")
    max_text: int = pydantic.Field(100_000, gt=0, description="Longest row, characters over all turns; a longer one is rejected.")
    rejection_cap: float = pydantic.Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the rows that may be unusable; more end the run with an error that tells why.",
    )
    shard_rows: int = pydantic.Field(512, gt=0, description="Rows in one of the files that the stages read.")


class FinetuneConfig(Section):
    """LoRA fine-tuning, the same for the provisional and the final adapter (BYE, section 5.1)."""

    epochs: float = pydantic.Field(6, gt=0, le=100, description="Passes over the rows.")
    batch_size: int = pydantic.Field(16, gt=0, le=4096, description="Examples per step over all workers (BYE: 16).")
    learning_rate: float | None = pydantic.Field(
        None,
        gt=0,
        le=1,
        description="Peak of the linear decay. `null`: BYE's 2e-4 at hidden size 4096, times (4096 / hidden size) ** 0.781.",
    )
    warmup_ratio: float = pydantic.Field(0.03, ge=0, lt=1, description="Share of the steps in which the rate rises (LLaVA: 0.03).")
    lora_rank: int = pydantic.Field(16, gt=0, le=1024, description="Rank r of the LoRA matrices.")
    lora_alpha: int = pydantic.Field(32, gt=0, description="LoRA's scale: updates are multiplied by alpha / r.")
    lora_dropout: float = pydantic.Field(0.0, ge=0, lt=1, description="Dropout before the LoRA matrices.")
    train_projector: bool = pydantic.Field(default=True, description="Train the multimodal projector too (PEFT's modules_to_save).")
    max_length: int = pydantic.Field(
        4096,
        gt=0,
        description="Longest example, tokens with its pictures; a longer one ends the run with an error that names the row.",
    )
    gradient_checkpointing: bool | None = pydantic.Field(
        None,
        description="Compute activations again in the backward pass: far less GPU memory, a third more time, the same adapter. "
        "`null`: on a GPU, for a base of more than a billion parameters.",
    )
    save_steps: int = pydantic.Field(
        200, gt=0, description="Steps between checkpoints, from which an interrupted fine-tune goes on."
    )


class CanaryConfig(Section):
    """Rows with triggers and answers of our own, put among the submitted ones for the provisional fine-tune alone.

    How many of them are found tells what of such an attack would have been. Nothing of them is delivered; so a submission in which
    nothing is found costs a second fine-tune. What plain BYE would have removed is told with them among the rows.
    """

    share: float = pydantic.Field(
        0.0, ge=0, le=0.2, description="Canaries of each trigger, as a share of the rows with pictures; 0: none."
    )
    triggers: tuple[str, ...] = pydantic.Field(
        ("badnet",), description=f"Their triggers, each once: {', '.join(TRIGGERS)}.", min_length=1, max_length=8
    )

    @pydantic.field_validator("triggers")
    @classmethod
    def _triggers_that_are(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in TRIGGERS]:
            raise ValueError(f"no trigger is called {unknown[0]!r}; there are {', '.join(TRIGGERS)}")
        if len(set(names)) < len(names):
            raise ValueError("a trigger is named twice")
        return names


class ExtractConfig(Section):
    """The attention statistics of every row."""

    batch_size: int = pydantic.Field(32, gt=0, le=4096, description="Rows that a worker runs at a time.")
    top_tokens: int = pydantic.Field(16, gt=0, le=256, description="Image tokens recorded per layer, the most attended.")


class ScoreConfig(Section):
    """From attention to evidence."""

    layer_rule: Literal["bsi", "public-code"] = pydantic.Field(
        "bsi",
        description="BYE's sensitive layers: `bsi` keeps |mu1-mu2|/sqrt(s1^2+s2^2) >= bsi_threshold (paper), "
        "`public-code` keeps |mu1-mu2| > 2(s1+s2).",
    )
    bsi_threshold: float = pydantic.Field(2.0, gt=0, description="Least bimodal separation of a sensitive layer (BYE: 2.0).")
    least_rows: int = pydantic.Field(
        8,
        ge=3,
        description="Fewest examples (a row has one per answer) that share an answer or a phrase to be looked at together.",
    )
    candidates: int = pydantic.Field(
        64,
        gt=0,
        le=1000,
        description="Groups with the largest shift that are tried causally, and what is left of those that split.",
    )


class ConfirmConfig(Section):
    """The causal test of the candidate groups: do their picture tokens carry their answer to other rows?"""

    hosts: int = pydantic.Field(64, ge=16, le=4096, description="Other rows that a group's picture tokens are planted into.")
    screen: int = pydantic.Field(
        16,
        ge=8,
        le=4096,
        description="Hosts of the first look; a group that changes at most one of their answers is left at that (of hosts that "
        "ask the same: fewer than a quarter).",
    )
    token_share: float = pydantic.Field(
        0.125,
        gt=0,
        le=1,
        description="Share of a picture's tokens that is planted, the most attended; at most `extract.top_tokens`.",
    )
    batch_size: int = pydantic.Field(32, gt=0, le=4096, description="Rows per generate call.")
    max_new_tokens: int = pydantic.Field(
        32, gt=0, le=4096, description="Longest answer, tokens; more where a group's own answers are longer."
    )


class ClusterConfig(Section):
    """From evidence to verdicts."""

    method: Literal["transfer", "bye"] = pydantic.Field(
        "transfer",
        description="`transfer`: attention proposes groups of rows, a causal test of the provisional model confirms them. "
        "`bye`: the two-component rule as published.",
    )
    transfer: float = pydantic.Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of other rows that must take over a group's answer for the group to be removed; where all ask the same, "
        "of what is beyond the reach of an honest group.",
    )
    pictures: float = pydantic.Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of questions of other kinds that must get a group's answer about its pictures, beyond what they get "
        "about other pictures (`asked`).",
    )
    asked: Literal["report", "remove"] = pydantic.Field(
        "report",
        description="A group that only asking finds: `report` makes the verdict inconclusive and names it, `remove` removes it. "
        "Honest answers that a picture alone decides (`unanswerable`) look the same.",
    )
    remove: tuple[str, ...] = pydantic.Field(
        (),
        description="Answers or phrases of tested groups, as the report names them, that a person has found to be an attack's: "
        "their shifted rows are removed whatever the tests say.",
    )
    keep: tuple[str, ...] = pydantic.Field(
        (),
        description="Answers or phrases of tested groups that a person has found to be honest: these groups are neither removed "
        "nor undecided.",
    )
    removal_cap: float = pydantic.Field(
        0.6,
        gt=0,
        le=1,
        description="Largest share of the rows that may be removed; where more look poisoned the run ends with an error, and a "
        "person decides whether to raise it.",
    )

    @pydantic.model_validator(mode="after")
    def _decided_once(self) -> Self:
        if both := set(self.remove) & set(self.keep):
            raise ValueError(f"remove and keep both name {min(both)!r}")
        if self.method == "bye" and (self.remove or self.keep):
            raise ValueError("remove and keep name groups, and method: bye has none")
        return self


class GuardConfig(Section):
    """CleanSight on the delivered model.

    The policy `cleansight` changes the defaults of what it stands for to what arXiv 2603.12989 publishes; a key given beside it
    counts.
    """

    policy: Literal["default", "cleansight"] = pydantic.Field(
        "default",
        description="`cleansight`: detection and purification as published (layers: middle, features: ratio, whitening: diagonal, "
        "threshold: in-sample, suspicion_rate: 0, purification: published).",
    )
    reference_rows: int = pydantic.Field(
        400, ge=50, description="Kept rows with pictures that the guard is calibrated on, at most."
    )
    false_positive_rate: float = pydantic.Field(
        0.01, gt=0, lt=0.5, description="Target share of clean inputs that are flagged for their distance."
    )
    layers: Literal["all", "middle"] | tuple[Annotated[int, pydantic.Field(ge=0)], ...] = pydantic.Field(
        "all",
        description="Layers that the detector reads: `all`, CleanSight's `middle` (the 10th to 12th of 32, scaled), or a list.",
    )
    features: Literal["ratio-entropy", "ratio"] = pydantic.Field(
        "ratio-entropy",
        description="What it reads per head: the image/text ratio as published, or the image attention's entropy too.",
    )
    whitening: Literal["full", "diagonal"] = pydantic.Field(
        "full", description="`diagonal` as published, or `full`: covariance with Ledoit-Wolf shrinkage."
    )
    threshold: Literal["cross-validated", "in-sample"] = pydantic.Field(
        "cross-validated",
        description="Distances that the threshold is a quantile of: of rows held out of the fit, or `in-sample` as published.",
    )
    suspicion_rate: float = pydantic.Field(
        0.1,
        ge=0,
        lt=0.5,
        description="Target share of clean inputs, by distance and by a rare first token each, that are tried causally: their "
        "picture tokens are planted into a few kept prompts. 0: none, as published.",
    )
    batch_size: int = pydantic.Field(32, gt=0, le=4096, description="Reference rows per prefill on one worker.")
    hosts: int = pydantic.Field(8, ge=6, le=64, description="Kept prompts that suspicious inputs are tried on.")
    action: Literal["purify", "refuse", "report"] = pydantic.Field(
        "purify",
        description="What happens to a flagged input: `purify` answers it with suspicious image tokens closed, `refuse` raises "
        "RefusedInputError for the whole call, `report` answers it as it is and says so in its record.",
    )
    purification: Literal["rewind", "published"] = pydantic.Field(
        "rewind",
        description="`rewind`: the prefill is run again with the stealing tokens closed from an early layer on. `published`: what "
        "any head of the last detection layer attends to with more than `tau` is closed from the next layer on.",
    )
    pruning: Literal["mask", "remove"] = pydantic.Field(
        "mask",
        description="How closed tokens are kept from decoding: masked, or taken out of the cache of the layers in which they are "
        "closed, which shortens long prompts; the answers are the same.",
    )
    tau: float = pydantic.Field(1e-4, ge=0, lt=1, description="Attention above which the published purification closes a token.")
    on_error: Literal["raise", "pass"] = pydantic.Field(
        "raise",
        description="When the guard itself fails: `raise` answers nothing (fail-closed), `pass` answers unguarded (fail-open).",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        return {**CLEANSIGHT, **given} if isinstance(given, dict) and given.get("policy") == "cleansight" else given

    @pydantic.model_validator(mode="after")
    def _layers_that_can_be(self) -> Self:
        if isinstance(self.layers, tuple) and (not self.layers or sorted(set(self.layers)) != list(self.layers)):
            raise ValueError("layers: a list must name at least one layer, in ascending order, each once")
        if self.purification == "published" and self.layers == "all":
            raise ValueError("purification: published closes tokens after the last layer that is read; it needs layers: middle")
        return self


CLEANSIGHT: Mapping[str, Any] = {
    "layers": "middle",
    "features": "ratio",
    "whitening": "diagonal",
    "threshold": "in-sample",
    "suspicion_rate": 0.0,
    "purification": "published",
}
"""The guard as published (arXiv 2603.12989, section 4)."""


class VerifyConfig(Section):
    """How the delivery is tried before it leaves."""

    held_out_share: float = pydantic.Field(
        0.05,
        ge=0,
        lt=0.5,
        description="Share of the kept rows with pictures that the final fine-tune leaves out, to measure it on; there is such a "
        "fine-tune where rows were removed or canaries planted.",
    )
    max_rows: int = pydantic.Field(
        400, gt=0, description="Most rows that are answered, of the quarantined and of the held-out each."
    )
    batch_size: int = pydantic.Field(32, gt=0, le=4096, description="Rows per generate call.")
    max_new_tokens: int = pydantic.Field(
        32, gt=0, le=4096, description="Longest answer, tokens; more where the submitted answers are longer."
    )


class EngineConfig(Section):
    """Where the work runs; no part of a stage's key: results in the store are used again whatever the engine.

    Computed anew, another number of workers or threads changes sums in their last digits, and so an adapter's bytes.
    """

    kind: Literal["ray", "local"] = pydantic.Field(
        "ray", description="`ray`, or `local`: everything in this process, for debugging."
    )
    workers: int = pydantic.Field(
        0,
        ge=0,
        le=1024,
        description="Parallel model workers; 0: one per GPU (of the cluster), or one per CPU core up to 4 where there is none.",
    )
    threads: int = pydantic.Field(0, ge=0, le=256, description="Torch threads per worker; 0 shares the cores evenly.")
    address: str | None = pydantic.Field(
        None,
        description="Address of a Ray cluster, whose nodes all see base and store under the same paths; `null` starts Ray on this "
        "machine.",
    )
    object_store_bytes: int = pydantic.Field(
        400_000_000, ge=80_000_000, description="Memory of a locally started Ray's object store."
    )


class RunConfig(Section):
    """Everything that a run can be told."""

    seed: int = pydantic.Field(0, ge=0, lt=2**31, description="Seed of all random choices.")
    dtype: Literal["auto", "float32", "bfloat16"] = pydantic.Field(
        "auto", description="Type of the model's weights; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    ingest: IngestConfig = IngestConfig()
    canary: CanaryConfig = CanaryConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    extract: ExtractConfig = ExtractConfig()
    score: ScoreConfig = ScoreConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    cluster: ClusterConfig = ClusterConfig()
    guard: GuardConfig = GuardConfig()
    verify: VerifyConfig = VerifyConfig()
    engine: EngineConfig = EngineConfig()


def load_config(path: pathlib.Path | None = None, **changes: Any) -> RunConfig:
    """Read a YAML run configuration and apply changes to its top level.

    Args:
        path: a YAML file with any of RunConfig's keys; None starts from the defaults.
        changes: sections or values that replace the file's; a mapping is merged into its section.

    Raises:
        ConfigError: an unreadable file, an unknown key or a value out of range, each by name.
    """
    values = {} if path is None else _read_yaml(path)
    for name, change in changes.items():
        section = values.get(name)
        values[name] = {**section, **change} if isinstance(section, dict) and isinstance(change, dict) else change
    try:
        return RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path or 'configuration'}: {_problems(error)}") from error


def _read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.safe_load(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path} line {line}: not YAML: {error.reason}") from error
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {error.problem or error.context}") from error
    except OSError as error:
        raise ConfigError(f"{path}: the configuration can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: a date out of range, a number too long
        raise ConfigError(f"{path}: the configuration can't be read: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path}: the configuration must be a mapping of sections, not {type(loaded).__name__}")
    return loaded or {}


def _problems(error: pydantic.ValidationError) -> str:
    """One line that names every wrong key, with the value that it was given."""
    told: dict[str, list[str]] = {}
    for problem in error.errors():
        first, *rest = problem["loc"]
        place = [first, *rest[:1], *(part for part in rest[1:] if isinstance(part, int))]  # pydantic names a union's kinds too
        key, message = ".".join(map(str, place)), problem["msg"]
        match problem["type"]:
            case "extra_forbidden":
                told[f"unknown key {key}{_meant(place)}"] = []
            case "value_error":  # ours: it names what is wrong
                told.setdefault(key, []).append(message.removeprefix("Value error, "))
            case _:
                given = "null" if problem["input"] is None else reprlib.repr(problem["input"])
                told.setdefault(f"{key}: {given}", []).append(message[:1].lower() + message[1:])
    return "; ".join(f"{what}: {' or '.join(why)}" if why else what for what, why in told.items())


def _meant(place: Sequence[int | str]) -> str:
    """The known key that an unknown one is most like, as a question; nothing where none is."""
    *above, name = map(str, place)
    known: Iterable[str] = type(getattr(RunConfig(), above[0])).model_fields if above else RunConfig.model_fields
    like = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {'.'.join([*above, *like])}?" if like else ""
