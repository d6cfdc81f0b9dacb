"""Will the program that loads the result take it? A loader's rules are data; the check runs over the plan, before any work."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lowbit.errors import NoRouteError, OptionError, UnknownComponentError
from lowbit.interfaces import Entry
from lowbit.metadata import Metadata
from lowbit.registry import Registry
from lowbit.scheme import Grid, Scheme
from lowbit.tensors import PackedSpec

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that serving engines join into one, and which must therefore share their setting."""
ROW_PARALLEL = ("o_proj", "down_proj")
"""Linears that tensor parallelism cuts along in_features; the others are cut along out_features."""


@dataclass(frozen=True, slots=True)
class LoaderRule:
    """What one version of one loader takes of one format. None, or an empty tuple, means no rule.

    Attributes:
        loader: The program, as ``--for`` names it.
        version: The version that the rule was read from.
        bits: Code widths it takes.
        symmetric: True when it takes symmetric weights only.
        asymmetric_bits: Code widths that it takes with zero points; () means those of ``bits``.
        group_sizes: Group sizes it takes; None in the tuple is the whole row.
        permutation: Whether it takes act-order.
        uniform: Whether all packed weights must share one scheme.
        fused: Whether q/k/v and gate/up must share one.
        in_multiple, out_multiple: What in_features and out_features of each tensor-parallel part must be a multiple of.
        lm_head: Whether it takes a quantized lm_head.
        whole_groups: Whether in_features of each tensor-parallel part must be a multiple of the group.
        model_types: Architectures it takes.
        refused_layouts: Layouts of the format that it does not know.
        casts_scales: Whether it casts scales to the model's dtype, which rounds float16 scales of a bfloat16 model.
        note: What a user must know besides, such as a package to install.
    """

    loader: str
    version: str
    bits: tuple[int, ...] = ()
    symmetric: bool = False
    asymmetric_bits: tuple[int, ...] = ()
    group_sizes: tuple[int | None, ...] = ()
    permutation: bool = True
    uniform: bool = False
    fused: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    lm_head: bool = True
    whole_groups: bool = False
    model_types: tuple[str, ...] = ()
    refused_layouts: tuple[str, ...] = ()
    casts_scales: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a loader says to a plan: sentences that stop it, and sentences worth knowing."""

    rule: LoaderRule
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]


def check_loader(
    loader: str, format: str, entries: Mapping[str, Entry], metadata: Metadata, registry: Registry, tp: int = 1
) -> Verdict:
    """Check what will be written against a loader's rules.

    Raises UnknownComponentError for a loader that no format knows, NoRouteError for a format that it does not load or a rule
    that is broken (every reason at once), OptionError for a tensor-parallel degree below 1.
    """
    if tp < 1:
        raise OptionError(f"--tp must be at least 1, got {tp}")
    known = _rules(registry, loader)
    if not known:
        loaders = sorted({rule.loader for exporter in registry.exporters.values() for rule in exporter.loaders()})
        raise UnknownComponentError(f"no loader named {loader!r}; known: {', '.join(loaders) or 'none'}")
    if format not in known:
        raise NoRouteError(f"{loader} does not load format {format!r}", {}, f"it loads {', '.join(known)}")
    written = replace(metadata, config=registry.exporters[format].model_config(entries, metadata))
    verdict = judge(known[format], entries, written, tp)
    if verdict.refusals:
        reasons = {f"{loader} {verdict.rule.version}": "; ".join(verdict.refusals)}
        raise NoRouteError(f"{loader} would not load this {format} checkpoint", reasons)
    return verdict


def judge(rule: LoaderRule, entries: Mapping[str, Entry], metadata: Metadata, tp: int = 1) -> Verdict:
    """Return every refusal, the same reason once with the first tensor that it concerns, and every warning."""
    refusals: dict[str, str] = {}
    packed = {name: entry for name, entry in entries.items() if isinstance(entry, PackedSpec)}
    for name, entry in packed.items():
        for reason in (*_scheme_reasons(rule, entry), *_shape_reasons(rule, name, entry, tp)):
            refusals.setdefault(reason, name)
        if not rule.lm_head and module_of(name) == "lm_head":
            refusals["it takes no quantized lm_head"] = name
    sentences = [f"{name}: {reason}" for reason, name in refusals.items()]
    sentences += [*_set_reasons(rule, packed), *_model_reasons(rule, metadata)]
    return Verdict(rule, tuple(sentences), tuple(_warnings(rule, packed, metadata)))


def _rules(registry: Registry, loader: str) -> dict[str, LoaderRule]:
    return {
        name: rule
        for name, exporter in registry.exporters.items()
        for rule in exporter.loaders()
        if rule.loader == loader
    }


def _scheme_reasons(rule: LoaderRule, entry: PackedSpec) -> Iterator[str]:
    scheme = entry.scheme
    if entry.layout in rule.refused_layouts:
        yield f"it does not know layout {entry.layout}"
    if scheme.grid is not Grid.AFFINE:
        return
    widths = rule.bits if scheme.symmetric else rule.asymmetric_bits or rule.bits
    if rule.symmetric and not scheme.symmetric:
        yield "it takes symmetric weights only"
    elif widths and scheme.bits not in widths:
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        yield f"it takes {kind} weights of {_either(widths)} bits, not {scheme.bits}"
    if rule.group_sizes and scheme.group_size not in rule.group_sizes:
        sizes = _either(tuple("the whole row" if size is None else size for size in rule.group_sizes))
        yield f"it takes groups of {sizes}, not {scheme.group_size or 'the whole row'}"
    if scheme.permutation and not rule.permutation:
        yield "it takes no act-order"


def _shape_reasons(rule: LoaderRule, name: str, entry: PackedSpec, tp: int) -> Iterator[str]:
    rows, columns = entry.shape
    along_input = module_of(name) in ROW_PARALLEL
    if (columns if along_input else rows) % tp:
        yield f"{columns if along_input else rows} features do not divide by --tp {tp}"
        return
    rows, columns = (rows, columns // tp) if along_input else (rows // tp, columns)
    group = entry.scheme.group_size
    if rule.whole_groups and group and columns % group:
        yield f"in_features of a part is {columns}, no multiple of the group size {group} (tensor-parallel degree {tp})"
    if columns % rule.in_multiple or rows % rule.out_multiple:
        yield f"a part of {rows}x{columns} is no multiple of {rule.out_multiple}x{rule.in_multiple}"


def module_of(name: str) -> str:
    """Return the last part of a module's path: ``down_proj`` of ``model.layers.0.mlp.down_proj.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _set_reasons(rule: LoaderRule, packed: Mapping[str, PackedSpec]) -> Iterator[str]:
    schemes = {entry.scheme for entry in packed.values()}
    if rule.uniform and len(schemes) > 1:
        yield f"it takes one scheme for all weights, not {len(schemes)}: {', '.join(sorted(s.summary() for s in schemes))}"
    if rule.fused:
        for first, others in _siblings(packed):
            settings: set[Scheme | None] = {
                packed[name].scheme if name in packed else None for name in (first, *others)
            }
            if len(settings) > 1:
                yield f"{first} and its siblings are fused on load and must share one setting"
                return


def _siblings(packed: Mapping[str, PackedSpec]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each packed weight that is fused on load, with its sibling names."""
    for name in packed:
        for group in FUSED:
            match = re.fullmatch(rf"(.*\.)({'|'.join(group)})\.weight", name)
            if match:
                yield name, tuple(f"{match[1]}{other}.weight" for other in group if other != match[2])


def _model_reasons(rule: LoaderRule, metadata: Metadata) -> Iterator[str]:
    model_type = metadata.config.get("model_type")
    if rule.model_types and model_type not in rule.model_types:
        yield f"it takes model types {', '.join(rule.model_types)}, not {model_type!r}"


def _warnings(rule: LoaderRule, packed: Mapping[str, PackedSpec], metadata: Metadata) -> Iterator[str]:
    if rule.note:
        yield rule.note
    dtype = metadata.config.get("dtype") or metadata.config.get("torch_dtype")
    scales = {entry.scheme.scales.dtype for entry in packed.values()}
    if rule.casts_scales and dtype == "bfloat16" and "float16" in scales:
        yield (
            f"{rule.loader} casts float16 scales to the model's bfloat16, which rounds most of them (relative error up to "
            "0.4 %); set torch_dtype to float16 in config.json, or quantize with bfloat16 scales, to keep them exact"
        )


def _either(values: tuple[object, ...]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))
