"""Filters of rows: the line's, plain BYE's by both rules, ablations of BYE's last step, and filters of the field.

Each takes what one provisional fine-tune gives, and never the truth. None is tuned here: a constant is the published one, or a
convention that is named. Every filter judges the rows with a picture; other rows stay.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from flows import line
from flows.line import Line
from pipeline.attention import base_of
from pipeline.generation import encode_on
from pipeline.models import load_adapter, load_base
from pipeline.records import Example, Verdict, examples_of, sample_from_record
from stages.cluster.run import VERDICTS
from stages.extract.table import AttentionTable
from stages.score.bye import LayerRule, bye, layer_profiles, two_components
from storage.store import StageResult
from storage.subset import canonical_shards

RANDOM_SHARE = 0.2
DEVIATIONS = 2.0
"""Of the fixed threshold: rows this many standard deviations below the mean are removed (a convention, as for outliers)."""
ASSUMED_SHARE = 0.1
"""Poison share that spectral signatures are told; the method can't do without one."""
EXCESS = 1.5
"""Spectral signatures remove this multiple of the assumed number of poisoned rows (Tran et al. 2018, algorithm 1)."""
COMPONENTS = 10
"""Dimensions that activation clustering reduces to (Chen et al. 2018, section 4.1)."""
SILHOUETTE = 0.1
"""Least silhouette at which activation clustering removes its smaller cluster (Chen et al. 2018: a threshold from 0.10 to 0.15)."""
SEPARATION = 2.0
"""Least separation of a head that votes in our reading of TCAP: BYE's index, and BYE's limit for a layer."""
_STEPS, _TOLERANCE, _LEAST = 200, 1e-6, 1e-3  # of the votes' EM: most steps, change of the posterior at its end, least rate
_STARTS = 50
"""Starts of 2-means in `COMPONENTS` dimensions: with 10 it misses a cluster apart among 400 rows of noise, with 50 it finds it."""
_BATCH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What filters may look at.

    Attributes:
        rows: number of submitted rows.
        table: the extract stage's statistics of the examples with a picture.
        hidden: float32 (examples, width), see `last_hidden`; the examples are those of the table.
        verdicts: the cluster stage's table, a record per submitted row in order.
        verdict: of the whole submission.
        asking: table and verdict of a line that is set to remove what asking finds (`cluster.asked: remove`).
        threshold: least separation of a layer by the paper's rule, as the line was configured.
        seed: of the run.
    """

    rows: int
    table: AttentionTable
    hidden: np.ndarray
    verdicts: pa.Table
    verdict: str
    asking: tuple[pa.Table, str]
    threshold: float
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filtered:
    """What a filter says of a submission.

    Attributes:
        removed: bool (rows,).
        score: float (rows,), larger for rows that are more suspicious; None where the filter has nothing to rank rows by.
        verdict: of the whole submission; None of a filter that gives none.
    """

    removed: np.ndarray
    score: np.ndarray | None
    verdict: str | None = None


Filter = Callable[[Evidence], Filtered]


def gather(run: Line, stages: Mapping[str, StageResult]) -> Evidence:
    """The evidence of a line that has run until its verdicts."""
    rows = line.rows_of(stages["ingest"])
    config = run.config.model_copy(update={"cluster": run.config.cluster.model_copy(update={"asked": "remove"})})
    asking = line.cluster(
        dataclasses.replace(run, config=config),
        ingested=stages["ingest"],
        scored=stages["score"],
        confirmed=stages["confirm"],
    )
    table = AttentionTable.read(stages["extract"].folder / "attention.parquet")
    hidden, of_row = last_hidden(run, rows, stages["provisional"].folder / "adapter")
    assert of_row.tolist() == table.row.tolist()
    return Evidence(
        rows=int(stages["ingest"].summary["submitted"]),
        table=table,
        hidden=hidden,
        verdicts=pq.read_table(stages["cluster"].folder / VERDICTS),
        verdict=str(stages["cluster"].summary["verdict"]),
        asking=(pq.read_table(asking.folder / VERDICTS), str(asking.summary["verdict"])),
        threshold=run.config.score.bsi_threshold,
        seed=run.config.seed,
    )


@torch.inference_mode()
def last_hidden(run: Line, rows: pathlib.Path, adapter: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """What the language head reads at the last prompt position: the last decoder layer's state, after the final norm.

    Args:
        run: names the base and the type of its weights.
        rows: folder of canonical shards, streamed.
        adapter: of the provisional model.

    Returns:
        float32 (examples, width) of the examples with a picture, in order, and the row of each, int (examples,).
    """
    model, processor = load_base(run.base, dtype=run.config.dtype)
    model = load_adapter(model, adapter)
    read: list[np.ndarray] = []

    def keep(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0][:, -1].float().cpu().numpy())

    numbers: list[int] = []
    hook = base_of(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        for batch in _batches(rows):
            numbers += [example.row for example in batch]
            model(**encode_on(model, processor, batch), use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return np.concatenate(read), np.asarray(numbers)


def _batches(rows: pathlib.Path) -> Iterator[list[Example]]:
    """The examples with a picture of a folder of shards, `_BATCH` at a time."""
    waiting: list[Example] = []
    for shard in canonical_shards(rows):
        for records in pq.ParquetFile(shard).iter_batches(batch_size=_BATCH):
            for record in records.to_pylist():
                waiting += [example for example in examples_of(sample_from_record(record)) if example.images]
            while len(waiting) >= _BATCH:
                yield waiting[:_BATCH]
                waiting = waiting[_BATCH:]
    if waiting:
        yield waiting


def ours(evidence: Evidence) -> Filtered:
    """The line's verdicts; the score is the posterior in a confirmed group, and where that is equal the projection on a shift."""
    return _of_the_line(evidence.verdicts, evidence.verdict)


def ours_asking(evidence: Evidence) -> Filtered:
    """The line's with `cluster.asked: remove`: groups that show only where other questions are asked go, too."""
    return _of_the_line(*evidence.asking)


def _of_the_line(verdicts: pa.Table, verdict: str) -> Filtered:
    posterior, projection = (np.nan_to_num(np.asarray(verdicts[name].to_pylist(), dtype=float)) for name in ("posterior", "score"))
    _, rank = np.unique(np.stack([posterior, projection], axis=1), axis=0, return_inverse=True)
    removed = np.asarray(verdicts["verdict"].to_pylist()) == str(Verdict.QUARANTINE)
    return Filtered(removed=removed, score=rank.ravel().astype(float), verdict=verdict)


def bye_paper(evidence: Evidence) -> Filtered:
    """BYE by the paper's rule (arXiv 2505.16916): the cluster stage's column `bye_quarantine`."""
    return _bye(evidence, "bsi", "bye_quarantine")


def bye_code(evidence: Evidence) -> Filtered:
    """BYE by the rule of its public code: the cluster stage's column `bye_code_quarantine`."""
    return _bye(evidence, "public-code", "bye_code_quarantine")


def _bye(evidence: Evidence, rule: LayerRule, column: str) -> Filtered:
    """The line's column, with the mean entropy of the sensitive layers as the score; none without a sensitive layer."""
    entropy = evidence.table.entropy
    found = bye(entropy, layer_profiles(entropy, rule, evidence.threshold, evidence.seed), evidence.seed)
    removed = np.asarray(evidence.verdicts[column].to_pylist(), dtype=float) == 1  # null of a rejected row
    score = None if np.isnan(found.score).any() or not len(found.score) else _by_row(evidence, -found.score)
    return Filtered(removed=removed, score=score)


def k_means(evidence: Evidence) -> Filtered:
    """BYE with k-means (k = 2) in the place of its last mixture: the cluster of the lower mean entropy is removed.

    The score is the mean entropy of the layers that the paper's rule finds sensitive, or of all layers if there is none.
    """
    entropy = _mean_entropy(evidence)
    if np.ptp(entropy) == 0:
        return _nothing(evidence, -entropy)
    found = KMeans(2, n_init=10, random_state=evidence.seed).fit(entropy[:, None])
    return _judged(evidence, found.labels_ == found.cluster_centers_.ravel().argmin(), -entropy)


def fixed_threshold(evidence: Evidence) -> Filtered:
    """BYE with a fixed threshold in the place of its last mixture: the mean less `DEVIATIONS` standard deviations.

    The score is that of `k_means`.
    """
    entropy = _mean_entropy(evidence)
    return _judged(evidence, entropy < entropy.mean() - DEVIATIONS * entropy.std(), -entropy)


def random_rows(evidence: Evidence) -> Filtered:
    """`RANDOM_SHARE` of the rows with pictures, drawn by the seed."""
    drawn = np.random.default_rng([evidence.seed, 43]).permutation(len(evidence.table)).astype(float)
    return _judged(evidence, drawn >= len(drawn) - round(RANDOM_SHARE * len(drawn)), drawn)


def spectral_signatures(evidence: Evidence) -> Filtered:
    """Spectral signatures (Tran et al., NeurIPS 2018): the squared projection of the centred hidden state on its top direction.

    Over all rows: answers are free text, and where the target is nobody's right answer a class of its own would be pure poison, in
    which the method has nothing to tell apart. `EXCESS` times `ASSUMED_SHARE` of the rows are removed, poison or not.
    """
    centred = evidence.hidden - evidence.hidden.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    score = np.square(centred @ directions[0]).astype(float)
    return _judged(evidence, _largest(score, round(EXCESS * ASSUMED_SHARE * len(score))), score)


def activation_clustering(evidence: Evidence) -> Filtered:
    """Activation clustering (Chen et al. 2018): the hidden states in `COMPONENTS` dimensions, 2-means; the smaller cluster goes.

    It goes if the silhouette is at least `SILHOUETTE`. Over all rows, for the reason that `spectral_signatures` gives. The authors
    reduce by ICA; its components are those of a whitened PCA but for a rotation, to which 2-means and silhouette are blind. The
    score is how much nearer a row is to the centre of the smaller cluster.
    """
    hidden = evidence.hidden.astype(float)
    components = min(COMPONENTS, *hidden.shape)
    if len(hidden) < 4 or not hidden.std(axis=0).any():
        return _nothing(evidence, np.zeros(len(hidden)))
    reduced = PCA(components, whiten=True, random_state=evidence.seed).fit_transform(hidden)
    found = KMeans(2, n_init=_STARTS, random_state=evidence.seed).fit(reduced)
    smaller = int(np.bincount(found.labels_, minlength=2).argmin())
    distance = found.transform(reduced)
    score = distance[:, 1 - smaller] - distance[:, smaller]
    if silhouette_score(reduced, found.labels_) < SILHOUETTE:
        return _nothing(evidence, score)
    return _judged(evidence, found.labels_ == smaller, score)


def tcap(evidence: Evidence) -> Filtered:
    """Attention allocation, after the idea of TCAP (arXiv 2601.21692): our reading of its abstract, at small scale, not its code.

    Per layer and head the share of the last prompt position's attention on the system (all before the picture), the picture, and
    the question. A two-component mixture is fitted to each share; a head votes by that of its shares which separates best, if that
    has a separation of at least `SEPARATION`, and its vote falls on the rows of the smaller component. The votes are joined by EM
    (Dawid and Skene 1979): every head has a rate of votes on suspicious rows and one on others. Rows that are suspicious with more
    than 0.5 are removed; without a head that votes, none. The score is the log odds.
    """
    votes = head_votes(allocation(evidence.table), evidence.seed)
    if not votes.shape[1]:
        return _nothing(evidence, np.zeros(len(votes)))
    odds = joined_votes(votes)
    return _judged(evidence, odds > 0, odds)


def allocation(table: AttentionTable) -> np.ndarray:
    """Shares of attention on system, picture and question, float (examples, layers, heads, 3), each at least 0."""
    image = table.image_share.astype(float)
    question = np.minimum(image * np.exp(-table.ratio.astype(float)), 1)
    return np.stack([np.clip(1 - image - question, 0, None), image, question], axis=-1)


def head_votes(shares: np.ndarray, seed: int) -> np.ndarray:
    """The votes of the heads that separate, bool (examples, voting heads). shares: float (examples, layers, heads, components)."""
    votes = []
    for head in shares.reshape(len(shares), -1, shares.shape[-1]).transpose(1, 2, 0):
        fits = [fit for fit in (two_components(share, seed) for share in head) if fit is not None and fit.bic_gain > 0]
        best = max(fits, key=lambda fit: fit.separation, default=None)
        if best is not None and best.separation >= SEPARATION:
            low = best.posterior > 0.5
            votes.append(low if low.mean() <= 0.5 else ~low)
    return np.stack(votes, axis=1) if votes else np.empty((len(shares), 0), bool)


def joined_votes(votes: np.ndarray) -> np.ndarray:
    """Log odds that a row is suspicious, float (examples,); votes: bool (examples, heads)."""
    given = votes.astype(float)
    posterior = given.mean(axis=1)
    odds = np.zeros(len(given))
    for _ in range(_STEPS):
        suspicious = np.clip(posterior.mean(), _LEAST, 1 - _LEAST)
        hit, false = (
            np.clip(weight @ given / max(weight.sum(), _LEAST), _LEAST, 1 - _LEAST) for weight in (posterior, 1 - posterior)
        )
        odds = np.log(suspicious / (1 - suspicious)) + given @ np.log(hit / false) + (1 - given) @ np.log((1 - hit) / (1 - false))
        before, posterior = posterior, 1 / (1 + np.exp(-np.clip(odds, -500, 500)))
        if np.abs(posterior - before).max() < _TOLERANCE:
            break
    return odds


FILTERS: dict[str, Filter] = {
    "ours": ours,
    "ours, asking removes": ours_asking,
    "bye, paper's rule": bye_paper,
    "bye, public code's rule": bye_code,
    "k-means on entropy": k_means,
    "fixed threshold on entropy": fixed_threshold,
    "random, 20%": random_rows,
    "spectral signatures": spectral_signatures,
    "activation clustering": activation_clustering,
    "tcap": tcap,
}
"""By name, in the order of the tables."""


def _mean_entropy(evidence: Evidence) -> np.ndarray:
    """Mean entropy over the sensitive layers by the paper's rule, or over all if there is none, float (examples,), nats."""
    entropy = evidence.table.entropy
    profiles = layer_profiles(entropy, "bsi", evidence.threshold, evidence.seed)
    layers = [profile.layer for profile in profiles if profile.sensitive] or list(range(entropy.shape[1]))
    return np.asarray(entropy[:, layers].mean(axis=1), dtype=float)


def _largest(score: np.ndarray, count: int) -> np.ndarray:
    """The rows with the `count` largest scores, bool (rows,)."""
    chosen = np.zeros(len(score), bool)
    chosen[np.argsort(-score, kind="stable")[:count]] = True
    return chosen


def _nothing(evidence: Evidence, score: np.ndarray) -> Filtered:
    return _judged(evidence, np.zeros(len(score), bool), score)


def _judged(evidence: Evidence, removed: np.ndarray, score: np.ndarray) -> Filtered:
    """From examples to rows: a row goes if one of its examples does."""
    rows = np.zeros(evidence.rows, bool)
    rows[evidence.table.row[removed]] = True
    return Filtered(removed=rows, score=_by_row(evidence, score))


def _by_row(evidence: Evidence, score: np.ndarray) -> np.ndarray:
    """The largest score of a row's examples, float (rows,); rows without a picture get the least."""
    rows = np.full(evidence.rows, score.min() if len(score) else 0.0)
    np.maximum.at(rows, evidence.table.row, score)
    return rows
