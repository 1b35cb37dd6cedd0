-- Shared by every script, which is put behind it. KEYS[1] is the namespace's hash tag.
-- Times are whole milliseconds. A script checks everything before its first write: Lua does not roll back.

local call = redis.call

local function key(name, ...)
  return string.format(TEMPLATES[name], KEYS[1], ...)
end

local function now_ms(given)
  if given ~= '' then
    return tonumber(given)
  end
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local MAX_EVENTS, EVENTS_TTL_MS = 500, 3600000

-- Write down what happened to a job whose request asked for events; the hash stays the truth.
local function note(id, kind, now, ...)
  local fields = call('HMGET', key('job', id), 'events', 'row')
  if fields[1] then
    local stream = key('events', fields[1])
    call('XADD', stream, 'MAXLEN', MAX_EVENTS, '*', 'kind', kind, 'row', fields[2], 'at', now, ...)
    call('PEXPIRE', stream, EVENTS_TTL_MS)
  end
end

local function wake_deliverer()
  if call('LLEN', key('hooks_wake')) == 0 then
    call('RPUSH', key('hooks_wake'), '1')
  end
end

-- A request is read as a whole: those of its jobs that have ended are there for so long at least.
local function keep_rows(lead, ttl_ms)
  for row in string.gmatch(lead and call('HGET', key('job', lead), 'rows') or '', '%S+') do
    call('PEXPIRE', key('job', row), ttl_ms, 'GT')
  end
end

local HOOK_MS = 3 * 3600000 -- longer than all tries of a delivery take

-- A job of a request with a hook has ended: what its delivery will tell is kept, and with the last job it is due.
local function hook_due(id, now)
  local lead = call('HGET', key('job', id), 'hooked')
  keep_rows(lead, HOOK_MS)
  if lead and call('HEXISTS', key('job', lead), 'open') == 1
    and call('HINCRBY', key('job', lead), 'open', -1) == 0 then
    call('ZADD', key('hooks'), now, lead)
    wake_deliverer()
  end
end

-- What is kept of a request as a whole lies in the hash of its first job, its lead.
local MAX_LISTED = 1000

local function keep_request(ids, now, record, owner, lists, events, hook, ttl)
  local lead = key('job', ids[1])
  call('HSET', lead, 'record', record, 'owner', owner, 'rows', table.concat(ids, ' '))
  if hook then
    call('HSET', lead, 'open', #ids)
  end
  for row, id in ipairs(ids) do
    if hook then
      call('HSET', key('job', id), 'hooked', ids[1])
    end
    if events then
      call('HSET', key('job', id), 'events', ids[1], 'row', row - 1)
      note(id, 'queued', now)
    end
  end
  for name in string.gmatch(lists, '%S+') do
    local list = key('list', name)
    call('ZADD', list, now, ids[1])
    call('ZREMRANGEBYRANK', list, 0, -MAX_LISTED - 1)
    call('PEXPIRE', list, ttl)
  end
end

-- An operator's word on a model: 'paused' (jobs are stored and wait), 'draining' (no new ones), or false.
local function gate_of(model)
  return call('HGET', key('gates'), model)
end

-- Is there work for this model that a worker may take?
local function has_work(model)
  return call('EXISTS', key('ready', model)) == 1 and gate_of(model) ~= 'paused'
end

-- Device time that a tenant was charged for, over its weight. One that comes (back) to a model's backlog starts
-- level with the least of those that wait there: neither with a claim on what it missed, nor behind the others.
local function used_by(model, tenant)
  local clock = tonumber(call('HGET', key('clock'), model) or 0)
  return math.max(clock, tonumber(call('ZSCORE', key('used'), tenant) or 0))
end

-- One bucket's part of a window: {model, bucket, waiting, {tenant, used, ...},
--   {id, tenant, due, deadline or '', cost, weight, burnt, ...}}.
-- The tenants that are owed most come first, each with its share of the rows: nobody can fill the window.
local MAX_WINDOW_TENANTS = 16

local function look_into(model, bucket, most_rows)
  local names = call('ZRANGE', key('tenants', model, bucket), 0, MAX_WINDOW_TENANTS - 1)
  local each = math.ceil(most_rows / #names)
  local used, rows = {}, {}
  for _, tenant in ipairs(names) do
    used[#used + 1] = tenant
    used[#used + 1] = string.format('%.3f', used_by(model, tenant))
    local heads = call('ZRANGE', key('bucket', model, bucket, tenant), 0, each - 1, 'WITHSCORES')
    for i = 1, #heads, 2 do
      local job = call('HMGET', key('job', heads[i]), 'deadline', 'cost', 'weight', 'burnt', 'wire')
      if tonumber(job[5] or 1) <= WIRE then -- else a worker of a later version will come for it
        for _, value in ipairs({ heads[i], tenant, heads[i + 1], job[1] or '', job[2], job[3], job[4] }) do
          rows[#rows + 1] = value
        end
      end
    end
  end
  return { model, bucket, call('ZCARD', key('due', model, bucket)), used, rows }
end

-- Is this job all that waits for its model?
local function is_alone(model, bucket)
  return call('ZCARD', key('ready', model)) == 1 and call('ZCARD', key('due', model, bucket)) == 1
end

-- What a claim of a lone job will return, as far as it can be told before.
local function claimed(id, model, bucket, attempt)
  local job = call('HMGET', key('job', id), 'tenant', 'payload', 'burnt', 'enqueued', 'reply')
  local awaited = (job[5] or '') ~= '' and 1 or 0
  return { id, model, bucket, job[1], job[2], attempt, tonumber(job[3]), tonumber(job[4]), awaited }
end

-- After a model's backlog changed. One token is enough to wake everybody: whoever claims and leaves work
-- behind puts the next one. A token may say what there is to take, while that is one job. With the last backlog go the accounts: nobody waits, so nobody is owed anything.
local function settle(model, lone_bucket, lone_token)
  local wake = key('wake', model)
  if call('EXISTS', key('ready', model)) == 1 then
    call('SADD', key('models'), model)
    if call('LLEN', wake) == 0 and gate_of(model) ~= 'paused' then
      local lone = lone_bucket and is_alone(model, lone_bucket)
      call('RPUSH', wake, lone and lone_token() or '1')
    end
  else
    call('DEL', wake)
    call('HDEL', key('clock'), model)
    call('SREM', key('models'), model)
    if call('EXISTS', key('models')) == 0 then
      call('DEL', key('used'))
    end
  end
end

-- Put a job whose hash is written into its bucket; return what its tenant used. The caller settles the model.
local function enter(id, model, bucket, tenant, due, enqueued, deadline)
  call('ZADD', key('bucket', model, bucket, tenant), due, id)
  call('ZADD', key('due', model, bucket), due, id)
  local used = used_by(model, tenant)
  call('ZADD', key('tenants', model, bucket), used, tenant)
  call('ZADD', key('ready', model), 'LT', due, bucket)
  call('ZADD', key('waiting', model), enqueued, id)
  if deadline then
    call('ZADD', key('deadlines'), deadline, id)
  end
  return used
end

-- Take a queued job out of its bucket, from anywhere in it. The caller settles the model.
local function leave(id, model, bucket, tenant)
  call('ZREM', key('bucket', model, bucket, tenant), id)
  call('ZREM', key('due', model, bucket), id)
  call('ZREM', key('waiting', model), id)
  if call('EXISTS', key('bucket', model, bucket, tenant)) == 0 then
    call('ZREM', key('tenants', model, bucket), tenant)
  end
  local head = call('ZRANGE', key('due', model, bucket), 0, 0, 'WITHSCORES')
  if head[1] then
    call('ZADD', key('ready', model), head[2], bucket)
  else
    call('ZREM', key('ready', model), bucket)
  end
end

local function is_long(bucket)
  return string.sub(bucket, -5) == ':long'
end

-- A job has left its worker (and `leases`), which is free for other long work unless it runs more of it.
local function stop_long(bucket, worker)
  if not is_long(bucket) or not worker then
    return
  end
  for _, id in ipairs(call('ZRANGE', key('leases'), 0, -1)) do
    local job = call('HMGET', key('job', id), 'bucket', 'worker')
    if job[2] == worker and is_long(job[1]) then
      return
    end
  end
  call('ZREM', key('long'), worker)
end

-- A job that ran, or was to run again, keeps its place in the order: its due time.
local function requeue(id)
  local job = call('HMGET', key('job', id), 'model', 'bucket', 'tenant', 'due', 'enqueued', 'deadline', 'worker')
  stop_long(job[2], job[7])
  call('HSET', key('job', id), 'state', 'queued')
  call('HDEL', key('job', id), 'worker', 'started', 'progress')
  enter(id, job[1], job[2], job[3], job[4], job[5], job[6])
  settle(job[1])
  note(id, 'queued', now_ms(''))
end

-- Does this worker still hold this attempt?
local function owns(id, worker, attempt)
  local job = call('HMGET', key('job', id), 'state', 'worker', 'attempt')
  return job[1] == 'running' and job[2] == worker and job[3] == attempt
end

local WINDOW_MS = 10000

-- What a waiting process reads of a job that has ended: its id, the fields of a view, and bytes that came with the
-- result. Each is its length, a colon and itself; '-' where there is none.
local function news(id, attached)
  local view = call('HMGET', key('job', id), unpack(VIEW_FIELDS))
  local parts = {}
  for i, value in ipairs({ id, unpack(view) }) do
    parts[i] = value and #value .. ':' .. value or '-'
  end
  parts[#parts + 1] = attached and #attached .. ':' .. attached or '-'
  return table.concat(parts)
end

-- The one way into done, failed and cancelled: counts, expiry and the one event per waiting process.
-- dead_ttl_ms: of a dead letter, which may outlive its result; its request's other jobs do not.
local function finish(id, state, now, result_ttl_ms, attached, dead_ttl_ms)
  local job, ttl_ms = key('job', id), math.max(result_ttl_ms, dead_ttl_ms or 0)
  local fields = call('HMGET', job, 'tenant', 'reply', 'events', 'bucket', 'worker', 'replayed')
  stop_long(fields[4], fields[5])
  call('HSET', job, 'state', state, 'finished', now)
  call('PEXPIRE', job, ttl_ms)
  keep_rows(fields[6], result_ttl_ms) -- the others ended long before
  call('ZREM', key('deadlines'), id)
  for _, tenant in ipairs({ '', fields[1] }) do
    if call('HINCRBY', key('inuse'), tenant, -1) <= 0 then
      call('HDEL', key('inuse'), tenant)
    end
  end
  local finished = key('finished', string.format('%.0f', math.floor(now / WINDOW_MS)))
  call('INCR', finished)
  call('PEXPIRE', finished, 3 * WINDOW_MS)
  note(id, state, now)
  if fields[3] then -- nobody can ask for events of a request that is gone
    call('PEXPIRE', key('events', fields[3]), math.min(ttl_ms, EVENTS_TTL_MS))
  end
  hook_due(id, now)
  for instance in string.gmatch(fields[2] or '', '%S+') do
    call('PUBLISH', key('done', instance), news(id, attached))
  end
end

-- Returns 1, 0 when the job had already ended, -1 when it is unknown.
local function cancel(id, now, result_ttl)
  local job = call('HMGET', key('job', id), 'state', 'model', 'bucket', 'tenant')
  local state = job[1]
  if not state then
    return -1
  elseif state == 'queued' then
    leave(id, job[2], job[3], job[4])
    settle(job[2])
  elseif state == 'delayed' then
    call('ZREM', key('delayed'), id)
  elseif state == 'running' then
    call('ZREM', key('leases'), id)
  else
    return 0
  end
  call('HDEL', key('job', id), 'payload', 'code', 'message')
  finish(id, 'cancelled', now, result_ttl)
  return 1
end

local function fail_for_good(id, now, code, message, result_ttl_ms, dead_ttl_ms)
  call('HSET', key('job', id), 'code', code, 'message', message)
  finish(id, 'failed', now, result_ttl_ms, nil, dead_ttl_ms)
end

local function fail_overdue(id, now, ttl_ms)
  local last = call('HMGET', key('job', id), 'code', 'message')
  local message = 'no worker was free before the deadline'
  if last[1] then
    message = 'the deadline passed before another attempt; the last one: ' .. last[1] .. ': ' .. (last[2] or '')
  end
  call('HDEL', key('job', id), 'payload')
  fail_for_good(id, now, 'deadline_exceeded', message, ttl_ms)
end

-- Fail a job and keep its payload for a replay, as one of the newest max_dead dead letters.
local function bury(id, now, code, message, result_ttl_ms, dead_ttl_ms, max_dead)
  local dead = key('dead')
  fail_for_good(id, now, code, message, result_ttl_ms, dead_ttl_ms)
  call('ZADD', dead, now, id)
  call('PEXPIRE', dead, dead_ttl_ms)
  call('ZREMRANGEBYSCORE', dead, '-inf', now - dead_ttl_ms)
  for _ = 1, call('ZCARD', dead) - max_dead do
    local oldest = call('ZPOPMIN', dead)[1]
    if call('EXISTS', key('job', oldest)) == 1 then
      call('HDEL', key('job', oldest), 'payload')
      call('PEXPIRE', key('job', oldest), result_ttl_ms, 'LT')
    end
  end
end

-- What an API key used: per day for the report, and per period for its budget.
local DAY_MS, USAGE_TTL_MS = 86400000, 92 * 86400000

local function usage_day(id, now)
  return key('usage', id, string.format('%.0f', math.floor(now / DAY_MS)))
end

-- The counter of the period that `now` is in, and how long that still lasts.
local function spent_in_period(id, now, period_s)
  local period = period_s * 1000
  local window = string.format('%.0f', math.floor(now / period))
  return key('spent', id, string.format('%.0f', period_s), window), period - now % period
end

-- A picture of this tenant stands: write down the device time that it took, if the tenant is an API key.
local function charge(tenant, now, device_us)
  local record = call('HMGET', key('apikey', tenant), 'created', 'budget_ms', 'budget_period_s')
  if not record[1] then
    return
  end
  local day = usage_day(tenant, now)
  call('HINCRBY', day, 'images', 1)
  call('HINCRBY', day, 'device_us', device_us)
  call('PEXPIRE', day, USAGE_TTL_MS)
  if record[2] then
    local spent, left = spent_in_period(tenant, now, tonumber(record[3]))
    call('INCRBY', spent, device_us)
    call('PEXPIRE', spent, left + 1000)
  end
end
