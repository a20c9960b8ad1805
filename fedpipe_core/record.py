"""What every record is: a frozen value with a JSON form. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen value with a JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid")
