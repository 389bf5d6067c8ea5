"""Container images of releases: the engine, image build, scan, sandbox, gateway, and Kubernetes manifests."""
