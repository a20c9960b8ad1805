"""What every section of the config is made of: a frozen record without unknown keys, and the values several share."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Bits = Literal[4, 8, 16, 32]
WireDtype = Literal["fp32", "bf16", "int8", "nf4"]
Rank = Annotated[int, Field(ge=1, le=1024)]


class Spec(BaseModel):
    """A frozen section of the config that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
