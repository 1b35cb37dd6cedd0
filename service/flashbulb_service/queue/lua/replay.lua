-- Queue a dead letter again with a fresh attempt budget. ARGV: now, id, target, result_ttl.
-- Returns 1, 0 when it is not one, or -1 when jobs of its request are gone, or what they drew is.

local now = now_ms(ARGV[1])
local id = ARGV[2]
local job = key('job', id)
if not call('ZSCORE', key('dead'), id) or call('HEXISTS', job, 'payload') == 0 then
  return 0
end
local fields = call('HMGET', job, 'model', 'bucket', 'tenant', 'hooked', 'lead')
if (fields[5] or '') ~= '' then -- dead letters outlive the other jobs, without which nobody can read the request
  local rows = call('HGET', key('job', fields[5]), 'rows')
  if not rows then
    return -1
  end
  for row in string.gmatch(rows, '%S+') do
    local other = call('HMGET', key('job', row), 'state', 'finished')
    -- A file lives as long as its result did at first, however long a replay has kept the hash.
    if not other[1] or (other[1] == 'done' and tonumber(other[2]) + tonumber(ARGV[4]) <= now) then
      return -1
    end
  end
  keep_rows(fields[5], ARGV[4])
  call('HSET', job, 'replayed', fields[5])
end
call('ZREM', key('dead'), id)
call('PERSIST', job)
local due = now + tonumber(ARGV[3])
call('HSET', job, 'state', 'queued', 'burnt', 0, 'enqueued', now, 'due', due)
call('HDEL', job, 'worker', 'started', 'finished', 'code', 'message', 'deadline', 'progress')
call('HINCRBY', key('inuse'), '', 1)
call('HINCRBY', key('inuse'), fields[3], 1)
enter(id, fields[1], fields[2], fields[3], due, now, false)
settle(fields[1])
if fields[4] and call('HEXISTS', key('job', fields[4]), 'open') == 1 then
  -- The request is open again, and its next end a delivery of its own: one that is under way no longer counts.
  local lead = key('job', fields[4])
  call('HINCRBY', lead, 'open', 1)
  call('HINCRBY', lead, 'replays', 1)
  call('HDEL', lead, 'hook_attempt')
  call('ZREM', key('hooks'), fields[4])
end
note(id, 'queued', now)
return 1
