"""SCBench: several questions over one shared context, whose cache is built once and reused."""
