# The host orders a function behind the IOMMU to reach where the guest never let it, or no longer lets it.
. /lib.sh
names="never-mapped never-mapped-logged unmapped unmapped-logged page-unchanged bus-master"
need_disk $((64 * MIB)) $names
FAULT_SECONDS=5
plan 6

# What the answer names must be in the kernel's log within seconds. The log check later sets these faults aside.
logged() { # name mark
	local device iova text
	device=$(field device)
	iova=$(field iova)
	text=$(guest log-wait /dev/kmsg "$2" "$device" "$iova" $FAULT_SECONDS)
	outcome $? "$1" "$text"
	echo "$device $iova" >>/run/faults-ordered
}

mark=$(guest log-mark /dev/kmsg)
ask isolation-never-mapped nvme="$NVME"
status=$?
outcome $status never-mapped "$(field text)"
if [ $status -eq 0 ]; then
	logged never-mapped-logged "$mark"
else
	skip never-mapped-logged "no DMA was made"
fi

# One page of the disk is read into a page that we keep; its mapping ended with the transfer.
mark=$(guest log-mark /dev/kmsg)
: >/run/answer
held=$(guest held-page "$DISK" $((32 * MIB)) sh /ask-unmapped.sh)
status=$?
if read -r asked_status answer </run/answer; then
	outcome "$asked_status" unmapped "$(field text)"
else
	asked_status=3
	fail unmapped "status $status: $held"
fi
if [ "$asked_status" -eq 0 ]; then
	logged unmapped-logged "$mark"
	outcome $status page-unchanged "${held:-the page that was read into is as it was}"
else
	skip unmapped-logged "no DMA was made"
	skip page-unchanged "no DMA was made"
fi

# Without the right to master the bus (command register, bit 2) a function reaches nothing, mapped or not.
config=/sys/bus/pci/devices/$NVME/config
command=$(od -An -tu1 -j4 -N1 "$config")
set_command() { printf "\\$(printf %03o "$1")" | dd of="$config" bs=1 seek=4 conv=notrunc 2>/dev/null; }
if [ $((command & 4)) -eq 0 ]; then
	fail bus-master "the kernel has not let $NVME master the bus: its command register holds $command"
else
	set_command $((command & ~4))
	ask isolation-bus-master nvme="$NVME"
	status=$?
	set_command "$command"
	outcome $status bus-master "$(field text)"
fi
finish
