"""Fields and errors that several rows of the table of commands share."""

from .command import Field, Unit
from .kinds import Kind

UNKNOWN = "no IOASID of this number in this context"
WRONG = "a field does not hold what its unit says"
NOT_BOUND = "the device is not bound to this context"
NO_DEVICE = "no such device"

IOASID = Field("ioasid", Unit.IOASID)
RID = Field("rid", Unit.RID)
PASID = Field("pasid", Unit.PASID, optional=True)
IOVA = Field("iova", Unit.ADDRESS)
SIZE = Field("size", Unit.SIZE)

FORMAT = (
    Field("vendor", Unit.NAME, True, "the format's name, as GET_INFO lists it"),
    Field("levels", Unit.COUNT, True, "of the table, counted from the leaves; 0: the usual number"),
    Field("accessed", Unit.FLAG, True, "walks set accessed bits"),
    Field("dirty", Unit.FLAG, True, "walks set dirty bits"),
    Field("address_width", Unit.BITS, True, "of an IOVA; 0: what the levels give"),
    Field("granule", Unit.BYTES, True, "the smallest page; 0: the usual one"),
    Field("output_width", Unit.BITS, True, "of the addresses in entries; 0: the usual one"),
    Field("upper_root", Unit.TABLE, True, "Arm stage 1: GPA of the root table of the upper range"),
    Field("upper_address_width", Unit.BITS, True, "of the upper range"),
    Field("upper_granule", Unit.BYTES, True, "of the upper range"),
    Field("options", Unit.NAMES, True, "of the format, as GET_INFO lists them"),
)

ON_KERNEL = frozenset({Kind.KERNEL})
ON_HOST_TABLE = frozenset({Kind.KERNEL, Kind.VM})
ON_USER = frozenset({Kind.USER})
ON_PARENT = ON_HOST_TABLE | ON_USER
