"""What a family of published models declares: its configuration and its names in files, both ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Final

from lightning_tex.models.config import DecoderConfig
from lightning_tex.models.families.rope import read_rope, write_rope
from lightning_tex.parallel.errors import UserValueError
from lightning_tex.pretrained.rules import Either, Rule

_REQUIRED: Final = object()

# How a decoder is trained, of which a configuration file of others says nothing.
TRAINING = (
    "capacity_factor", "round_factor", "dropout", "load_balance_coefficient", "z_loss_coefficient",
    "sequence_balance_coefficient", "step_balance_coefficient", "entropy_coefficient",
    "eval_capacity_factor", "min_capacity", "overflow_by",
)  # fmt: skip


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
        rope_theta, partial_rotary_factor: of the rotary embedding, in a file that does not say them.
        ignored: endings of names in files that are no weights.
        always_routed: there are experts in every block.
        with_experts, with_shared_expert: of a dense family, those that may have the same decoder with experts in the
            place of MLPs, and with a shared one beside them; the first that does is taken.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    fields: ClassVar[tuple[Field | Fixed, ...]] = SIZES
    rope_theta: ClassVar[float] = 10000.0
    partial_rotary_factor: ClassVar[float] = 1.0
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    always_routed: ClassVar[bool] = False
    with_experts: ClassVar[tuple[str, ...]] = ()
    with_shared_expert: ClassVar[tuple[str, ...]] = ()

    def left_out(self, names: Iterable[str], config: DecoderConfig) -> list[str]:
        """Of names in files those of weights that a decoder is whole without, and that no export has."""
        return []

    def said_anew(self) -> set[str]:
        """Keys of a ``config.json`` that :meth:`write` does not write, and that say the same as some that it does."""
        return {
            "rope_scaling",
            "partial_rotary_factor",
            *(name for f in self.fields if isinstance(f, Field) for name in f.also),
        }

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
        rope = read_rope(theirs, self.rope_theta, self.partial_rotary_factor)
        return {**ours, **rope, "activation": "swiglu"}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        """What of ``config.json`` :meth:`read` reads."""
        ours = asdict(settled(config))
        theirs = {f.theirs: ours[f.ours] if isinstance(f, Field) else f.value for f in self.fields}
        return {**theirs, **write_rope(config, self.partial_rotary_factor)}

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
        config = DecoderConfig(**{**self.read(theirs), **overrides})
        if self.always_routed and config.num_experts < 2:
            raise UserValueError(f"{self.model_type} has no decoder without experts; legal: 2 and more")
        return config

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


# What says nothing of a decoder without experts.
_OF_EXPERTS: dict[str, Any] = {
    "num_experts": 1,
    "top_k": 1,
    "norm_topk_prob": False,
    "expert_hidden_dim": None,
    "router": "softmax",
    "shared_expert_hidden_dim": None,
    "shared_expert_gate": False,
    "expert_bias": False,
    "expert_module": None,
    "residual_hidden_dim": None,
    "zero_experts": 0,
    "identity_experts": 0,
}


def settled(config: DecoderConfig) -> DecoderConfig:
    """With what is left open said: equal for decoders that are equal."""
    experts = [layer for layer in range(config.num_layers) if config.has_experts(layer)]
    windows = [config.window(layer) for layer in range(config.num_layers)]
    given: dict[str, Any] = {"expert_hidden_dim": config.expert_hidden, "router": _router(config.router)}
    dense = {name: without for name, without in _OF_EXPERTS.items() if not experts}
    if config.attention_multiplier is None and not config.kv_lora_rank:
        given["attention_multiplier"] = config.head**-0.5
    return replace(
        config,
        num_kv_heads=config.kv_heads,
        head_dim=None if config.kv_lora_rank else config.head,
        hidden_dim=config.hidden,
        sliding_window=config.sliding_window if any(windows) else None,
        layer_types=None if all(windows) or not any(windows) else config.layer_types,
        moe_layers=experts,
        moe_every=1,
        first_dense_layers=0,
        **{**given, **dense},
    )


def _router(router: str | dict[str, Any]) -> dict[str, Any]:
    """By name and all arguments that are not as they are without."""
    name, given = (router, {}) if isinstance(router, str) else (router["name"], router.get("init_args") or {})
    plain = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    return {"name": name, "init_args": {key: value for key, value in sorted(given.items()) if value != plain.get(key)}}
