-- Extend leases. ARGV: now, worker, lease, then per job: id, attempt. Returns the ids that are not the worker's.

local now = now_ms(ARGV[1])
local worker, lease = ARGV[2], tonumber(ARGV[3])
local lost = {}
for i = 4, #ARGV, 2 do
  if owns(ARGV[i], worker, ARGV[i + 1]) then
    call('ZADD', key('leases'), now + lease, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
