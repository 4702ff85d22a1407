# Every NVMe function but the one under test: its group, data through it, and DMA that it was not given.
. /lib.sh
[ -n "$DISK" ] || skip_all "no NVMe namespace was found" others
bytes=$((8 * MIB))
others=
for block in /sys/class/block/nvme*n1; do
	device=$(readlink -f "$block/device/device")
	[ "${device##*/}" = "$NVME" ] || others="$others ${device##*/}=${block##*/}"
done
[ -n "$others" ] || skip_all "there is one NVMe function" others
set -- $others
plan $((5 * $#))

for each; do
	bdf=${each%=*} disk=/dev/${each#*=}
	group=$(readlink -f "/sys/bus/pci/devices/$bdf/iommu_group")
	type=$(cat "$group/type" 2>/dev/null)
	iommu=$(readlink -f "/sys/bus/pci/devices/$bdf/iommu")
	case $type in
	DMA | DMA-FQ) pass "group-$bdf" "in group ${group##*/} of type $type, behind ${iommu##*/}" ;;
	*) fail "group-$bdf" "in group ${group##*/} of type ${type:-none}, which is not translated" ;;
	esac
	text=$(guest bulk "$disk" 0 $bytes)
	status=$?
	outcome $status "read-back-$bdf" "$text"
	sha256=${text#sha256=}
	ask data-written nvme="$bdf" offset=0 length=$bytes sha256="${sha256%% *}"
	outcome $? "host-copy-$bdf" "$(field text)"
	mark=$(guest log-mark /dev/kmsg)
	ask isolation-never-mapped nvme="$bdf"
	status=$?
	outcome $status "never-mapped-$bdf" "$(field text)"
	if [ $status -eq 0 ]; then
		iova=$(field iova)
		text=$(guest log-wait /dev/kmsg "$mark" "$bdf" "$iova" 5)
		outcome $? "never-mapped-logged-$bdf" "$text"
		echo "$bdf $iova" >>/run/faults-ordered
	else
		skip "never-mapped-logged-$bdf" "no DMA was made"
	fi
done
finish
