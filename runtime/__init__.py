"""Everything public: decisions about routing, KV pages and scheduling, and the `Backend` that runs a model."""
