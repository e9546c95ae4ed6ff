"""The paper's sections 2, 3 and 5.2 as primitives: meshes, collectives, sharding, replay."""
