"""What the user asked for: the schema of a recipe, how recipes are found and merged, and every
check.
"""

from interlace.trainer.config.load import Recipe, list_recipes, load_recipe
from interlace.trainer.config.schema import RunConfig

__all__ = ["Recipe", "RunConfig", "list_recipes", "load_recipe"]
