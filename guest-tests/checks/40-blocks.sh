# The commands that move no data: Flush, Write Zeroes, Dataset Management (Deallocate).
. /lib.sh
start=$((64 * MIB))
need_disk $((start + 4 * MIB)) flush write-zeroes discard
plan 3

cache=$(cat "$DISK_SYSFS/queue/write_cache")
flushes() { awk '{print $16}' "$DISK_SYSFS/stat"; } # Documentation/block/stat.rst: flush I/Os completed
if [ "$cache" != "write back" ]; then
	skip flush "the device has no volatile write cache ($cache)"
else
	before=$(flushes)
	error=$(dd if=/dev/zero of="$DISK" bs=4096 seek=$((start / 4096)) count=1 conv=fsync,notrunc 2>&1)
	status=$?
	after=$(flushes)
	if [ $status -ne 0 ]; then
		fail flush "$error"
	elif [ "$after" -gt "$before" ]; then
		pass flush "$((after - before)) completed"
	else
		fail flush "the kernel counts no flush after an fsync"
	fi
fi

if [ "$(cat "$DISK_SYSFS/queue/write_zeroes_max_bytes")" -gt 0 ]; then
	text=$(guest zeroes "$DISK" $((start + MIB)) $MIB)
	outcome $? write-zeroes "$text"
else
	skip write-zeroes "the device has no Write Zeroes"
fi

if [ "$(cat "$DISK_SYSFS/queue/discard_max_bytes")" -gt 0 ]; then
	text=$(guest discard "$DISK" $((start + MIB)) $MIB)
	outcome $? discard "$text"
else
	skip discard "the device has no Dataset Management"
fi
finish
