-- Store a new key. ARGV: now, id, most keys, field, value, field, value, ...
-- Returns 1, or 0 when there are as many keys as there may be.

local id = ARGV[2]
if call('ZCARD', key('apikeys')) >= tonumber(ARGV[3]) then
  return 0
end
call('HSET', key('apikey', id), 'created', now_ms(ARGV[1]), unpack(ARGV, 4))
call('ZADD', key('apikeys'), now_ms(ARGV[1]), id)
return 1
