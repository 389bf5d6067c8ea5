"""What a release runs in: the engine, runtime profiles, image build, Trivy, the sandbox."""
