"""Controllers: strategies that change another strategy's knobs from measured forgetting."""
