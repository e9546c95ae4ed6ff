"""What a family of published models declares: its configuration and its names in files, both ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final

from lightning_tex.models.config import DecoderConfig
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.rules import Either, Rule

_REQUIRED: Final = object()

# How a decoder is trained, of which a configuration file of others says nothing.
TRAINING = ("capacity_factor", "load_balance_coefficient", "z_loss_coefficient", "dropout")


@dataclass(frozen=True)
class Field:
    """A value that both configurations have.

    Args:
        theirs: its key in ``config.json``.
        ours: its name in :class:`DecoderConfig`.
        absent: what a file means that does not have it; without: it must.
        also: further keys that it may have, by the version that wrote the file.
    """

    theirs: str
    ours: str
    absent: Any = _REQUIRED
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """A value that only one value of is expressed here.

    Args:
        theirs: its key in ``config.json``.
        value: the one that is legal, and is written.
        absent: what a file means that does not have it; without: ``value``.
        also: further values that are as good.
    """

    theirs: str
    value: Any
    absent: Any = _REQUIRED
    also: tuple[Any, ...] = ()


# What nearly all families have.
SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "dim"),
    Field("intermediate_size", "hidden_dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", None),
    Field("max_position_embeddings", "max_sequence_length"),
    Field("tie_word_embeddings", "tie_embeddings", False),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("head_dim", "head_dim", None),
)


class Family(ABC):
    """One ``model_type`` of Hugging Face's ``transformers``.

    Class attributes that a subclass declares:
        model_type: as ``config.json`` has it.
        architecture: the class of transformers that has a head.
        fields: what is in both configurations, or has one legal value. What needs arithmetic goes into :meth:`read` and
            :meth:`write`.
        rope_theta: base of the rotary embedding of a file that says none.
        ignored: endings of names in files that are no weights.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[tuple[Field | Fixed, ...]] = SIZES
    rope_theta: ClassVar[float] = 10000.0
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)

    def said_anew(self) -> set[str]:
        """Keys of a ``config.json`` that :meth:`write` does not write, and that say the same as some that it does."""
        return {"rope_scaling", *(name for f in self.fields if isinstance(f, Field) for name in f.also)}

    @abstractmethod
    def rules(self, config: DecoderConfig) -> Iterator[Rule | Either]:
        """What each tensor in files is of a decoder of this configuration."""

    def read(self, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of :class:`DecoderConfig` that a ``config.json`` says.

        Raises:
            ValueError: something is missing, or has a value that is not expressed here.
        """
        ours: dict[str, Any] = {}
        for field in self.fields:
            if isinstance(field, Field):
                names = (field.theirs, *field.also)
                there = next((name for name in names if theirs.get(name) is not None), field.theirs)
                ours[field.ours] = self.value(theirs, there, field.absent)
                continue
            found = theirs.get(field.theirs, field.value if field.absent is _REQUIRED else field.absent)
            if found != field.value and found not in field.also:
                raise UserValueError(f"{self.model_type} with {field.theirs}={found!r} is not expressed here; legal: "
                                     f"{', '.join(map(repr, (field.value, *field.also)))}")  # fmt: skip
        return {**ours, "rope_base": self._rope_base(theirs), "activation": "swiglu"}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """What of ``config.json`` :meth:`read` reads."""
        ours = asdict(settled(config))
        theirs = {f.theirs: ours[f.ours] if isinstance(f, Field) else f.value for f in self.fields}
        rope = {"rope_type": "default", "rope_theta": config.rope_base}
        return {**theirs, "rope_parameters": rope, "rope_theta": config.rope_base}  # for transformers 5, and before

    def config(self, theirs: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> DecoderConfig:
        """Our configuration.

        Args:
            theirs: ``config.json``.
            overrides: arguments of :class:`DecoderConfig` that take precedence.

        Raises:
            ValueError: theirs is not expressed here, or an override is no argument.
        """
        overrides = overrides or {}
        known = DecoderConfig.__dataclass_fields__
        if unknown := [name for name in overrides if name not in known]:
            raise UserValueError(f"overrides of {', '.join(unknown)}; legal: {', '.join(known)}")
        return DecoderConfig(**{**self.read(theirs), **overrides})

    def described(self, config: DecoderConfig) -> dict[str, Any]:
        """Their configuration: what :meth:`write` gives, if it is read as the same decoder again.

        Raises:
            ValueError: the family has no such decoder, naming what differs.
        """
        theirs = self.write(config)
        if differing := self.differences(theirs, config):
            raise UserValueError(f"{self.model_type} has no decoder with {', '.join(differing)}")
        return {"architectures": [self.architecture], "model_type": self.model_type, **theirs}

    def differences(self, theirs: Mapping[str, Any], config: DecoderConfig) -> list[str]:
        """What of a configuration is another in a ``config.json``; how it is trained does not count."""
        wanted, found = (asdict(settled(c)) for c in (config, self.config(theirs)))
        return [
            f"{name}={value!r} (it has {found[name]!r})"
            for name, value in wanted.items()
            if name not in TRAINING and value != found[name]
        ]

    def value(self, theirs: Mapping[str, Any], key: str, absent: Any = _REQUIRED) -> Any:
        """A value of theirs; without ``absent`` it must be there."""
        if theirs.get(key) is None and absent is _REQUIRED:
            raise UserValueError(f"a config.json of {self.model_type} needs {key}")
        return theirs.get(key, absent)

    def _rope_base(self, theirs: Mapping[str, Any]) -> float:
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserValueError(f"{self.model_type} with a rotary scaling of type {kind!r} is not expressed here")
        return float(rope.get("rope_theta") or theirs.get("rope_theta") or self.rope_theta)


def settled(config: DecoderConfig) -> DecoderConfig:
    """With what is left open said: equal for decoders that are equal."""
    experts = [layer for layer in range(config.num_layers) if config.has_experts(layer)]
    routed: dict[str, Any] = {"expert_hidden_dim": config.expert_hidden}
    dense: dict[str, Any] = {"num_experts": 1, "top_k": 1, "norm_topk_prob": False, "expert_hidden_dim": None}
    return replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=config.head,
        hidden_dim=config.hidden,
        moe_layers=experts,
        moe_every=1,
        first_dense_layers=0,
        **(routed if experts else dense),
    )


# --- names that most families share


def embedding_and_head(config: DecoderConfig) -> Iterator[Rule]:
    """The first and the last matrices, and the norm between; a tied head may be there again."""
    yield Rule("model.embed_tokens.weight", ("embedding.weight",))
    yield Rule("model.norm.weight", ("norm.weight",))
    tied = config.tie_embeddings
    yield Rule("lm_head.weight", ("embedding.weight" if tied else "head.weight",), copy=tied)


def attention(theirs: str, ours: str, config: DecoderConfig) -> Iterator[Rule]:
    """Query, key, value and output of a block, their biases, and norms of queries and keys."""
    for their_name, our_name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
        biased = config.attention_out_bias if our_name == "out" else config.attention_bias
        for kind in ("weight", "bias") if biased else ("weight",):
            yield Rule(f"{theirs}.self_attn.{their_name}.{kind}", (f"{ours}.attention.{our_name}.{kind}",))
    if config.qk_norm:
        for their_name, our_name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            yield Rule(f"{theirs}.self_attn.{their_name}.weight", (f"{ours}.attention.{our_name}.weight",))


def norms(theirs: str, ours: str) -> Iterator[Rule]:
    """The norms before attention and before the feed-forward of a block."""
    yield Rule(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",))
    yield Rule(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.mlp_norm.weight",))


def dense_mlp(theirs: str, ours: str) -> Iterator[Rule]:
    """Gate, up and down of a block's MLP."""
    for name in ("gate", "up", "down"):
        yield Rule(f"{theirs}.{name}_proj.weight", (f"{ours}.{name}.weight",))


def experts(theirs: str, ours: str, count: int) -> Either:
    """A block's experts: a tensor each, or stacked ones with gate and up in one, as transformers 5 holds them.

    Args:
        theirs: such as ``model.layers.0.mlp.experts``.
        ours: such as ``blocks.0.mlp.experts``.
        count: of the experts.
    """
    each = tuple(
        Rule(f"{theirs}.{expert}.{name}_proj.weight", (f"{ours}.{name}",), expert=expert)
        for expert in range(count)
        for name in ("gate", "up", "down")
    )
    return Either((each, fused_experts(theirs, ours)))


def fused_experts(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A block's experts stacked, gate and up in one."""
    return (
        Rule(f"{theirs}.gate_up_proj", (f"{ours}.gate", f"{ours}.up"), dim=1),
        Rule(f"{theirs}.down_proj", (f"{ours}.down",)),
    )
