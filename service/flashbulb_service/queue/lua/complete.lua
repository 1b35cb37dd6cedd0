-- Store a result, fenced. Returns 1 when it stands.
-- ARGV: now, worker, id, attempt, result, result_ttl, device_us, bytes that only those who wait get or ''.

local now = now_ms(ARGV[1])
local worker, id, attempt, result, result_ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
if not owns(id, worker, attempt) then
  local job = call('HMGET', key('job', id), 'state', 'worker', 'attempt')
  -- our own earlier call, whose answer was lost on the way
  return (job[1] == 'done' and job[2] == worker and job[3] == attempt) and 1 or 0
end
call('ZREM', key('leases'), id)

-- When the batch was taken, its tenants' accounts were charged what was predicted: now they get what was measured.
local job, device_us = call('HMGET', key('job', id), 'tenant', 'weight', 'charged'), tonumber(ARGV[7])
if device_us > 0 and call('ZSCORE', key('used'), job[1]) then
  call('ZINCRBY', key('used'), device_us / 1000 / job[2] - job[3], job[1])
end

call('HSET', key('job', id), 'result', result)
call('HDEL', key('job', id), 'payload', 'code', 'message')
finish(id, 'done', now, result_ttl, ARGV[8] ~= '' and ARGV[8])
charge(job[1], now, device_us)
return 1
