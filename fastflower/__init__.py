from fastflower.augment import Augment as Augment
