"""TRC² as its first version describes it: narrow state units routed by chunks, without its look into the future."""
