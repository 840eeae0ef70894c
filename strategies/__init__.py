"""How a learner avoids forgetting: replay, regularizers, consolidation, controllers, optimizers."""
