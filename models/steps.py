"""The reference steps that every figure names, built from shapes alone.

In comes a name, out come a step, its arguments as `jax.ShapeDtypeStruct` trees, and the options for `jax.jit`. The
hand-made `jax.checkpoint` policies are added here, as baselines to compare with; the models have none, and memopt is
not imported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import gpt2, llama, lstm, resnet, unet, vit
from .common import wide
from .states import Step, abstract_state, adamw, dropout_step, image_step, language_step, norm_step

Args = tuple[Any, Any]
Reference = tuple[Step, Args, dict[str, Any]]

POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "qkvo": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "o"),
}
"""The policies for `jax.checkpoint` on each block that a person would try, by name."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How to build the step of one reference name.

    Args:
        model: the module class, called with a configuration and the class of a block.
        block: the class of one block, which a baseline wraps in `nn.remat`.
        batch: number of sequences or images of the full and the small form.
        full: configuration of the reference step.
        small: configuration of the small form.
        tiny: configuration for tests that run, with a batch of two.
        images: the batch holds images, not tokens.
    """

    model: Callable[..., nn.Module]
    block: type[nn.Module]
    batch: int
    full: Any
    small: Any
    tiny: Any
    images: bool = False


_GPT2 = dataclasses.replace(gpt2.GPT2_124M, vocabulary=50_304)
_VIT = (vit.ViT, vit.Block, 128, vit.VIT_B16, vit.VIT_SMALL_FORM, vit.VIT_TINY)
_RESNET = (resnet.ResNet, resnet.Block, 128, resnet.RESNET50, resnet.RESNET18, resnet.RESNET_TINY)
_UNET_2D = (unet.UNet, unet.ConvPair, 4, unet.UNET_2D, unet.UNET_2D_SMALL_FORM, unet.UNET_2D_TINY)
_UNET_3D = (unet.UNet, unet.ConvPair, 1, unet.UNET_3D, unet.UNET_3D_SMALL_FORM, unet.UNET_3D_TINY)
_LSTM = (lstm.LSTM, lstm.Cell, 20, lstm.LSTM_MEDIUM, lstm.LSTM_SMALL_FORM, lstm.LSTM_TINY)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(gpt2.GPT2, gpt2.Block, 8, _GPT2, gpt2.GPT2_SMALL_FORM, gpt2.GPT2_TINY),
    "gpt_bytes": Family(gpt2.GPT2, gpt2.Block, 16, gpt2.GPT_BYTES, gpt2.GPT_BYTES, gpt2.GPT2_TINY),
    "llama_1b": Family(llama.Llama, llama.Block, 1, llama.LLAMA_1B_UNTIED, llama.LLAMA_SMALL_FORM, llama.LLAMA_TINY),
    "llama_4l": Family(llama.Llama, llama.Block, 4, llama.LLAMA_4_LAYERS, llama.LLAMA_SMALL_FORM, llama.LLAMA_TINY),
    "vit_b": Family(*_VIT, images=True),
    "resnet": Family(*_RESNET, images=True),
    "unet_2d": Family(*_UNET_2D, images=True),
    "unet_3d": Family(*_UNET_3D, images=True),
    "lstm": Family(*_LSTM),
}
"""The reference steps by name."""


def reference_step(
    name: str,
    *,
    layers: Literal["scan", "unrolled"] | None = None,
    small: bool = False,
    tiny: bool = False,
    remat: str | None = None,
    batch: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    **overrides: Any,
) -> Reference:
    """Build a reference step and the shapes of its arguments; allocates and compiles nothing.

    Args:
        name: a key of `FAMILIES`, such as `"gpt2"`, `"llama_1b"`, `"llama_4l"`, `"vit_b"`.
        layers: scanned or unrolled blocks; None for the form of the reference table.
        small: the small form, for sweeps: 4 layers and 8,192 tokens of vocabulary, at the full width.
        tiny: a form small enough to run in a test within a second; wins over `small`.
        remat: a key of `POLICIES`: wrap each block in `jax.checkpoint` with that policy. None for the plain model.
        batch: number of sequences or images; None for that of the reference table.
        optimizer: an optax transformation; None for `adamw()`.
        **overrides: fields of the model's configuration, such as `length=512` or `dropout=0.1`. The number of blocks,
            the field `layers` of the configuration, is set by `depth`.

    Returns:
        `(step, args, options)`: `step(state, batch)` gives `(state, loss)`, `args` is the tuple `(state, batch)` with a
        `jax.ShapeDtypeStruct` in place of each array, `options` is `{"donate_argnums": (0,)}`.

    Raises:
        ValueError: the name, the policy or the form of the layers is unknown, or the model has no such form.
        TypeError: an override is no field of the configuration.

    Example:
        >>> step, (state, batch), options = reference_step("gpt2")
        >>> batch["tokens"].shape, options
        ((8, 1024), {'donate_argnums': (0,)})

    Limits: a baseline inside a scan turns `prevent_cse` off, as Flax advises; an unrolled one leaves it on.
    """
    family = FAMILIES.get(name)
    if family is None:
        raise ValueError(f"no reference step named {name!r}: choose one of {', '.join(FAMILIES)}")
    form = family.tiny if tiny else family.small if small else family.full
    config = _configure(name, form, layers or _form_of(family.full), overrides)
    model = family.model(config, block=_block(family.block, remat, _form_of(config)))
    inputs = _batch(family, config, 2 if batch is None and tiny else batch or family.batch)
    dropout = bool(getattr(config, "dropout", 0))
    leading = inputs["images" if family.images else "tokens"]
    state = abstract_state(model, leading, optimizer or adamw(), dropout=dropout)
    return _step(family, state, dropout), (state, inputs), {"donate_argnums": (0,)}


def make_args(name: str, axis: Literal["batch", "length"] = "batch", **options: Any) -> Callable[[int], Args]:
    """Make the function that `memopt.largest` wants: a size in, the shapes of a step's arguments out.

    Args:
        name: as in `reference_step`.
        axis: what the size is: `"batch"`, or a field of the configuration such as `"length"`.
        **options: the other arguments of `reference_step`.

    Returns:
        A function of one positive integer that returns `(state, batch)` for the step that `reference_step` returns with
        the same name and options.

    Example:
        >>> sizes = make_args("gpt2", small=True)
        >>> sizes(3)[1]["tokens"].shape
        (3, 1024)
    """

    def args(size: int) -> Args:
        sized: dict[str, Any] = {**options, axis: size}
        return reference_step(name, **sized)[1]

    return args


def concrete(args: Any, seed: int = 0) -> Any:
    """Fill shapes with arrays: a fresh training state and a random batch.

    Memory: allocates every leaf on the default device. Meant for small and tiny forms.

    Args:
        args: a tree of `jax.ShapeDtypeStruct`, as from `reference_step`.
        seed: seeds parameters, keys and batch; equal seeds give equal arrays.

    Returns:
        The same tree of arrays. Parameters are normal with deviation 0.02 (a convolution's by its fan-in), except that
        `scale` and `var` are ones and `bias` is zero; the rest of the state is zero. `tokens` lie below 256 and their
        `labels` are the next tokens, classes lie below 2, images are normal.

    Example:
        >>> state, batch = concrete(reference_step("gpt2", tiny=True)[1])
        >>> bool((batch["labels"][:, :-1] == batch["tokens"][:, 1:]).all())
        True
    """
    random = np.random.default_rng(seed)
    filled = jax.tree_util.tree_map_with_path(functools.partial(_fill, random), args)
    return jax.tree.map(_next_tokens, filled, is_leaf=_is_language_batch)


def _configure(name: str, config: Any, layers: str, overrides: dict[str, Any]) -> Any:
    """Apply the form of the layers and the overrides to a configuration; `depth` is its `layers`."""
    if layers not in ("scan", "unrolled"):
        raise ValueError(f"layers={layers!r} is unknown: choose 'scan' or 'unrolled'")
    changes = {"layers" if field == "depth" else field: value for field, value in overrides.items()}
    fields = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(changes.keys() - fields):
        known = ", ".join(sorted(fields))
        raise TypeError(f"{type(config).__name__} has no field {', '.join(unknown)}: choose from {known}")
    if "scan" in fields:
        changes["scan"] = layers == "scan"
    elif layers != _form_of(config):
        raise ValueError(f"{name} has no {layers} form: pass layers={_form_of(config)!r} or leave it out")
    return dataclasses.replace(config, **changes)


def _form_of(config: Any) -> str:
    return "scan" if getattr(config, "scan", False) else "unrolled"


def _block(block: type[nn.Module], remat: str | None, form: str) -> type[nn.Module]:
    """Wrap a block in `nn.remat` with the named policy; None leaves it plain."""
    if remat is None:
        return block
    if remat not in POLICIES:
        raise ValueError(f"no policy named {remat!r}: choose one of {', '.join(POLICIES)}")
    return nn.remat(block, policy=POLICIES[remat], prevent_cse=form == "unrolled")


def _batch(family: Family, config: Any, size: int) -> dict[str, Any]:
    """Make the shapes of a batch: tokens with their labels, or images with a class an image or a pixel."""
    if family.images:
        images = jax.ShapeDtypeStruct((size, *config.image_shape), wide(config.dtype))
        return {"images": images, "labels": jax.ShapeDtypeStruct((size, *config.label_shape), jnp.int32)}
    tokens = jax.ShapeDtypeStruct((size, config.length), jnp.int32)
    return {"tokens": tokens, "labels": tokens}


def _step(family: Family, state: Any, dropout: bool) -> Step:
    if not family.images:
        return dropout_step if dropout else language_step
    return norm_step if hasattr(state, "batch_stats") else image_step


def _fill(random: np.random.Generator, path: tuple[Any, ...], leaf: Any) -> jax.Array:
    """Make one array of `concrete` from its path and shape; NumPy draws it, so that nothing is compiled."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(int(random.integers(2**31)))
    name, state = _last_name(path), jax.tree_util.keystr(path)
    if name == "images":
        return jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype)
    if name in ("tokens", "labels"):
        return jnp.asarray(random.integers(0, 256 if name == "tokens" else 2, leaf.shape), leaf.dtype)
    if name in ("scale", "var") and "opt_state" not in state:
        return jnp.ones(leaf.shape, leaf.dtype)
    if "params" not in state or "opt_state" in state or name == "bias":
        return jnp.zeros(leaf.shape, leaf.dtype)
    fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 3 else 2_500
    return jnp.asarray(random.standard_normal(leaf.shape) * fan_in**-0.5, leaf.dtype)


def _last_name(path: tuple[Any, ...]) -> str:
    return str(getattr(path[-1], "key", getattr(path[-1], "name", "")))


def _is_language_batch(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.keys() == {"tokens", "labels"}


def _next_tokens(tree: Any) -> Any:
    """Make the labels of a language batch its next tokens, the last one wrapping round."""
    if not _is_language_batch(tree):
        return tree
    return {"tokens": tree["tokens"], "labels": jnp.roll(tree["tokens"], -1, axis=-1)}
