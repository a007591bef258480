"""Recipes: how an update is trained, as YAML files found by name. A recipe is data: it names objectives, merge rules
and so on, which are code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from core.digests import digest_json
from core.errors import ConfigError
from core.ledger.rows import Family as Family
from core.settings import Settings
from updater.recipes.plugin_registry import recipe_files

SHIPPED = Path(__file__).parent
Part = Literal["new", "reference", "replay"]
TrainPrecision = Literal["float32", "bfloat16"]
PARTS: tuple[Part, ...] = ("new", "reference", "replay")
PLACE = "{}"
Template = Annotated[str, StringConstraints(pattern=r"^[^{}]*\{\}[^{}]*$", max_length=200)]


class Section(BaseModel):
    """A group of fields; rejects unknown keys and numbers that are not finite (``.inf``, ``.nan``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Tower(Section):
    locked: bool = Field(False, description="Nothing in this part learns; a CLIP tower keeps its embedding space.")
    blocks: int | None = Field(
        None, ge=0, description="Last blocks that learn (0: only what follows the blocks); all when unset."
    )
    rate: float = Field(1.0, gt=0, le=100, description="Factor on the learning rate (SLCA's slow tower: below 1).")


class Adapter(Section):
    kind: str = Field("lora", description="lora is PEFT's; others are listed in docs/recipes/all.md.")
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)


class Optimizer(Section):
    kind: str = "adamw"
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)


class Gradients(Section):
    harmonize: bool = Field(False, description="Project each term's gradient off those that it conflicts with.")
    drop: float = Field(0.0, ge=0, lt=1, description="Share of new rows left out at most: those most in conflict.")


class Mixture(Section):
    """Shares of one batch: reference pool P, new data D, replay buffer B. They add up to 1."""

    reference: float = Field(0.33, ge=0, le=1)
    new: float = Field(0.34, gt=0, le=1)
    replay: float = Field(0.33, ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        total = self.reference + self.new + self.replay
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of reference, new and replay add up to {total:g}, not to 1")
        return self


class Batches(Section):
    domains: Literal["mixed", "grouped"] = Field(
        "mixed", description="grouped: runs of one domain, whose rows are each other's (hard) negatives."
    )
    group: int = Field(16, ge=2, le=65536, description="Rows of one domain in a run (grouped only).")


class Views(Section):
    """Views of an image (CLIP only): each pass over a pool takes the next one, which is prepared and charged then."""

    count: int = Field(1, ge=1, le=4, description="Views of each image; the first one is the image as it is.")
    area: float = Field(0.6, gt=0, le=1, description="Least share of the image that is in another view.")
    flip: bool = Field(False, description="Mirror half of the other views: not where left, right or letters count.")


class Term(Section):
    """One term of the loss: an objective (``updater/methods/objectives.py``) or a regularizer, by name."""

    name: str
    weight: float = Field(1.0, ge=0)
    over: tuple[Part, ...] = Field(PARTS, min_length=1, description="Rows of the batch that it sees.")
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)


class Schedule(Section):
    """Learning rate over steps; see ``updater/methods/optimizers.py``. No field is a horizon."""

    kind: Literal["infinite", "rsqrt", "cosine"] = "infinite"
    peak: float = Field(1e-3, gt=0, description="Learning rate at the end of the warm-up.")
    constant: float = Field(5e-4, gt=0, description="Learning rate of the constant phase (infinite only).")
    final: float = Field(5e-5, gt=0, description="Learning rate at the end of the anneal.")
    warmup_steps: int = Field(10, ge=0)
    cooldown_steps: int = Field(30, ge=0, description="Cosine from peak to constant (infinite only).")
    anneal_steps: int = Field(20, ge=0, description="Exponential anneal before a candidate is handed over.")
    updates: Literal["constant", "rsqrt"] = Field(
        "constant", description="What becomes of rates from update to update."
    )


class Merge(Section):
    """Merge of the incumbent's delta with the trained one, served after an update. Rules are in
    ``updater/methods/merging.py`` or plugins; ``none`` serves the trained delta. ``start`` is where the next update
    trains from: the served delta (EMA merge), the trained one (finetuned merge), or the base (zero-shot merge).
    ``search`` lists weights to try: the one that scores best on the tuning half of the gate's suites replaces
    ``weight``, and the gate then uses the hidden half."""

    rule: str = "linear"
    weight: float = Field(0.9, gt=0, le=1, description="Weight of the trained delta.")
    start: Literal["served", "trained", "base"] = "served"
    search: tuple[float, ...] = Field((), max_length=20, description="Weights of a line search; each is scored once.")
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if self.search and self.rule == "none":
            raise ValueError("search looks for the weight of a rule, and rule is none")
        if any(not 0 < weight <= 1 for weight in self.search) or len(set(self.search)) < len(self.search):
            raise ValueError(f"search is {list(self.search)}: weights differ, above 0 and at most 1")
        return self


class Recipe(Section):
    """Everything that, with the data and the seed, decides what an update computes."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    family: Family = Field("clip", description="What it trains: the CLIP, on captions, or the VLM, on questions.")
    rank: int = Field(8, ge=1, le=256)
    alpha: float = Field(16.0, gt=0)
    image: Tower = Field(default_factory=Tower)
    text: Tower = Field(default_factory=Tower)
    connector: Tower = Field(Tower(locked=True), description="What brings images into a VLM's language model.")
    batch_size: int = Field(96, ge=2, le=65536)
    micro_batch: int = Field(
        0, ge=0, le=65536, description="Rows of one pass of the model, for a batch larger than memory; 0: all at once."
    )
    precision: Literal["auto"] | TrainPrecision = Field(
        "auto", description="Of the model's passes; auto: bfloat16 where the processor multiplies it fast."
    )
    mixture: Mixture = Field(default_factory=Mixture)
    batches: Batches = Field(default_factory=Batches)
    views: Views = Field(default_factory=Views)
    caption_templates: tuple[Template, ...] = Field(
        (), max_length=100, description="Put around short captions, such as 'a photo of a {}'; each view has another."
    )
    reference_limit: int = Field(1500, ge=0, description="Reference examples drawn for one update.")
    replay_limit: int = Field(1500, ge=0, description="Capacity of the replay reservoir.")
    replay_balanced: bool = Field(True, description="Balanced over concepts; else every earlier row is as likely.")
    replay_half_life: float = Field(10_000, gt=0, description="Rows after which a concept's count is halved.")
    adapter: Adapter = Field(default_factory=Adapter)
    objectives: tuple[Term, ...] = Field(min_length=1)
    regularizers: tuple[Term, ...] = ()
    gradients: Gradients = Field(default_factory=Gradients)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    merge: Merge = Field(default_factory=Merge)
    average_every: int = Field(0, ge=0, description="Steps between the parameters whose mean is trained; 0: the last.")
    max_steps: int = Field(200, ge=1, description="Bound on steps, whatever the budget.")
    temperature: float | None = Field(None, gt=0, description="Softmax temperature; the base's when unset.")
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="Bound on the norm of one step's gradient.")

    @model_validator(mode="before")
    @classmethod
    def _eyes_stay(cls, values: Any) -> Any:
        """Lock a VLM's image tower by default, so that its features are computed once."""
        if isinstance(values, dict) and values.get("family") == "vlm":
            return {"image": {"locked": True}, **values}
        return values

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.family == "clip" and not self.connector.locked:
            raise ValueError("a CLIP has no connector that could learn")
        if self.family == "vlm" and self.adapter.kind != "lora":
            raise ValueError(f"adapter.kind is {self.adapter.kind!r}, and a VLM is served with LoRA alone")
        if self.family == "vlm" and self.gradients.drop:
            raise ValueError("gradients.drop compares the features of pairs, and a VLM has none")
        if self.family == "vlm" and (self.views.count > 1 or self.caption_templates):
            raise ValueError("views and caption_templates are of a CLIP: a VLM is asked where things are")
        if self.micro_batch and self.gradients.harmonize:
            raise ValueError("micro_batch gives the gradient of the loss, and gradients.harmonize wants each term's")
        if self.image.locked and self.text.locked and self.connector.locked:
            raise ValueError("both towers are locked, so that nothing would learn")
        if not any(term.weight > 0 for term in self.objectives):
            raise ValueError("every objective has weight 0")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe without its description, 64 hex digits."""
        return digest_json(self.model_dump(mode="json", exclude={"description"}))

    def to_yaml(self) -> str:
        # Escape all non-ASCII: PyYAML writes the line break U+0085 unescaped, and reads it as a space.
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def parse(cls, values: Any, origin: str = "recipe") -> Recipe:
        """Validate a mapping. Raises ConfigError that names the field."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the recipe as a whole"
            raise ConfigError(
                f"{origin}: {field} is not valid: {first['msg']}.",
                "Compare with updater/recipes/default.yaml and vlm-default.yaml.",
            ) from None


def recipe_names() -> list[str]:
    return sorted(recipe_files(SHIPPED))


def load_recipe(name: str | Path) -> Recipe:
    """Load a recipe by name, or by the path of its YAML file. Raises ConfigError."""
    path, known = Path(name), recipe_files(SHIPPED)
    if str(name) in known:
        path = known[str(name)]
    elif path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise ConfigError(
            f"there is no recipe {str(name)!r}.",
            f"Use one of {', '.join(recipe_names())}, or the path of a YAML file; the papers' recipes are in"
            " the package ratchet-methods (docs/recipes.md).",
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "Fix the line it names.") from None
    return Recipe.parse(values, str(path))


def family_recipe(settings: Settings, family: Family) -> Recipe:
    """Recipe that the settings name for a family. Raises ConfigError if it is of the other one."""
    setting = "vlm_recipe" if family == "vlm" else "recipe"
    recipe = load_recipe(getattr(settings.updater, setting))
    if recipe.family != family:
        raise ConfigError(
            f"updater.{setting} is {recipe.name!r}, which trains a {recipe.family.upper()}.",
            f"Name a recipe with `family: {family}` there.",
        )
    return recipe
