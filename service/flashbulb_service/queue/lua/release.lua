-- Hand running jobs back without burning an attempt. ARGV: worker, then per job: id, attempt. Returns how many.

local released = 0
for i = 2, #ARGV, 2 do
  if owns(ARGV[i], ARGV[1], ARGV[i + 1]) then
    call('ZREM', key('leases'), ARGV[i])
    requeue(ARGV[i])
    released = released + 1
  end
end
return released
