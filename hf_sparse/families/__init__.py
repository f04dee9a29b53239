"""Where the weight matrices of a model lie: four layouts cover nearly every family of Transformers."""
