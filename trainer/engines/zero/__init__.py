"""DeepSpeed's ZeRO as the engine of a run: imported only when a recipe asks for it."""
