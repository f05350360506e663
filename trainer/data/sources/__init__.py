"""Where text comes from: one small file per kind, all behind `Source`."""
