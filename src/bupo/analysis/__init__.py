"""What every layer and module decides: rollouts in, tables out."""
