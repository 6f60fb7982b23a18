"""What only development needs: throw-away servers, the demo, benchmarks. Nothing of it ships."""
