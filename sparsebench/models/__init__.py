"""Models: loading, the embedded tiny ladder, function-preserving outliers."""
