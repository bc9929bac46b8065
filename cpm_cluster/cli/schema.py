"""cpm schema: JSON Schema of what people write."""

from __future__ import annotations

import json

import click

from cpm_cluster.cli import exit_codes
from cpm_cluster.specs.schema import KINDS, json_schema


@click.command(
    "schema",
    epilog="\b\nExample:\n  cpm schema job > job.schema.json\n"
    "  # then, first line of a job file: # yaml-language-server: $schema=job.schema.json",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("kind", type=click.Choice(list(KINDS)))
def command(kind: str) -> int:
    """Print the JSON Schema of a KIND of file, for editors and checks."""
    click.echo(json.dumps(json_schema(kind), indent=2, ensure_ascii=False))
    return exit_codes.OK
