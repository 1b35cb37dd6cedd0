-- Count one request of a key and let it in, or say why not. ARGV: now, id, digest of its secret, usage kept for.
-- Returns {'unknown'}, {'budget', spent us, wait ms}, {'rate' | 'ok', capacity, remaining, wait ms, full in ms},
-- or {'ok'} without a rate.

local now = now_ms(ARGV[1])
local id, digest = ARGV[2], ARGV[3]
local stored = call('HMGET', key('apikey', id), 'digest', 'old_digest', 'old_until', 'requests_per_minute', 'burst',
  'budget_ms', 'budget_period_s')

-- Here as well as in the caller: what the caller knows may be some seconds old.
local good = stored[1] == digest or (stored[2] == digest and now < tonumber(stored[3]))
if not stored[1] or not good then
  return { 'unknown' }
end

local function count(what)
  local day = usage_day(id, now)
  call('HINCRBY', day, what, 1)
  call('PEXPIRE', day, ARGV[4])
end

if stored[6] then
  local spent, wait = spent_in_period(id, now, tonumber(stored[7]))
  local used = tonumber(call('GET', spent) or 0)
  if used >= tonumber(stored[6]) * 1000 then
    count('refused')
    return { 'budget', used, wait }
  end
end

if not stored[4] then
  count('requests')
  return { 'ok' }
end

-- A bucket of tokens that fills up at the rate and holds a burst; it lives until it would be full again.
local per_ms = tonumber(stored[4]) / 60000
local capacity = tonumber(stored[5] or stored[4])
local bucket = call('HMGET', key('rate', id), 'tokens', 'at')
local passed = math.max(0, now - tonumber(bucket[2] or now))
local tokens = math.min(capacity, tonumber(bucket[1] or capacity) + passed * per_ms)
local outcome = 'ok'
if tokens + 1e-6 >= 1 then
  tokens = math.max(0, tokens - 1)
  call('HSET', key('rate', id), 'tokens', tokens, 'at', now)
  call('PEXPIRE', key('rate', id), math.ceil(capacity / per_ms) + 1000)
  count('requests')
else
  outcome = 'rate'
  count('refused')
end
return { outcome, capacity, math.floor(tokens + 1e-6), math.max(0, math.ceil((1 - tokens) / per_ms)),
  math.ceil((capacity - tokens) / per_ms) }
